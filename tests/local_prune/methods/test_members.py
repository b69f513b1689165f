"""Structured scores against explicit loops over the data in float64, and what every method that only ranks keeps to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.amp import AmpPruner
from local_prune.methods.flap import FlapPruner, fluctuation
from local_prune.methods.magnitude_sp import MagnitudeMembersPruner, magnitudes
from local_prune.methods.shared.members import best
from local_prune.methods.taylor import TaylorPruner, member_saliencies
from local_prune.methods.wanda_sp import WandaSpPruner, wanda_sp
from local_prune.pruner import Calibration, Task
from search.inputs.models import LoadedModel
from supernet.candidates import Members, member_columns
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, sub_blocks

CPU = torch.device("cpu")
LEVELS = [9, 5, 2, 1, 0]


def track(items: Any, title: str) -> Any:
    return items


@dataclass(frozen=True)
class Layer:
    """A projection and its inputs: X (tokens, d_in) float64, W (d_out, d_in), members of `width` columns."""

    X: Tensor
    W: Tensor
    bias: Tensor | None
    width: int

    @property
    def members(self) -> int:
        return self.W.shape[1] // self.width

    def task(self, pruner: Any) -> Task:
        statistics = pruner.statistics(self.W, self.width)
        scores = None
        if statistics is None:
            scores = self.X.square().sum(0).view(-1, self.width).sum(1).float()  # a survey's, as good as any
        else:
            for batch in self.X.split(17):
                statistics.add(batch)
        return Task("unit", self.W, statistics, scores, self.width, self.bias)


def make_layer(
    members: int = 10,
    width: int = 1,
    d_out: int = 6,
    tokens: int = 50,
    seed: int = 0,
    dead: tuple[int, ...] = (),
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_in = members * width
    X = normal(tokens, d_in) * normal(d_in).exp() + normal(d_in)
    for member in dead:
        X[:, member * width : (member + 1) * width] = 0.0
    return Layer(X.float().double(), normal(d_out, d_in).to(dtype), normal(d_out).to(dtype) if bias else None, width)


# Scores written out from their formulas, one member at a time.


def wanda_sp_score(layer: Layer, m: int) -> float:
    """As in the authors' code: the mean of |W| ||X|| over the outputs, and over the columns of a head."""
    total = 0.0
    for j in range(m * layer.width, (m + 1) * layer.width):
        norm = float(layer.X[:, j].square().sum().sqrt())
        total += sum(abs(float(layer.W[i, j])) * norm for i in range(len(layer.W))) / len(layer.W)
    return total / layer.width


def flap_score(layer: Layer, m: int) -> float:
    """As in the authors' code: for heads the mean of the squares over the columns, for neurons the metric itself."""
    total = 0.0
    for j in range(m * layer.width, (m + 1) * layer.width):
        x = layer.X[:, j]
        metric = float((x - x.mean()).square().mean()) * float(layer.W[:, j].double().square().sum())
        total += metric if layer.width == 1 else metric**2
    return total / layer.width


def amp_score(layer: Layer, m: int) -> float:
    if layer.width == 1:
        return float(layer.X[:, m].abs().mean())
    columns = slice(m * layer.width, (m + 1) * layer.width)
    return sum(float((layer.W[:, columns].double() @ x[columns]).abs().sum()) for x in layer.X) / len(layer.X)


SCORES: dict[str, tuple[Any, Callable[[Layer, int], float]]] = {
    "wanda_sp": (WandaSpPruner(), wanda_sp_score),
    "flap": (FlapPruner(), flap_score),
    "flap without compensation": (FlapPruner(compensate=False), flap_score),
    "amp": (AmpPruner(), amp_score),
}


@pytest.mark.parametrize(("pruner", "score"), SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_members_of_the_highest_scores_stay(
    pruner: Any, score: Callable[[Layer, int], float], width: int, seed: int
) -> None:
    layer = make_layer(width=width, seed=seed)
    ranking = sorted(range(layer.members), key=lambda m: -score(layer, m))
    for count, candidate in zip(LEVELS, pruner.candidates(layer.task(pruner), LEVELS), strict=True):
        assert candidate.kept.tolist() == sorted(ranking[:count])


def test_heads_are_ranked_by_the_squares_of_what_fluctuates() -> None:
    """Where the mean of the columns themselves says otherwise, and no square is lost that float32 does not hold."""
    variance = torch.tensor([5.0, 1.0, 4.0, 4.0])
    for scale in (1.0, 1e-30):
        first, second = fluctuation(torch.eye(4), variance * scale, 2).tolist()
        assert first == pytest.approx(13**0.5 * scale) and second == pytest.approx(4.0 * scale)
    first, second = fluctuation(torch.eye(4), torch.tensor([5.0, 0.0, 3.0, 3.0]), 2)
    assert first > second  # of the means, 2.5 < 3


def test_wanda_sp_takes_the_mean_of_absolute_values() -> None:
    # by the L2 norm the first column comes second, too; by the mean 1.5 < 2.5
    dense = torch.tensor([[3.0, 2.5], [0.0, 2.5]])
    torch.testing.assert_close(wanda_sp(dense, torch.tensor([2.0, 1.0]), 1), torch.tensor([3.0, 2.5]))
    torch.testing.assert_close(wanda_sp(dense, torch.tensor([2.0, 1.0]), 2), torch.tensor([2.75]))


def test_methods_rank_differently() -> None:
    """Else the test above could not tell them apart."""
    layer = make_layer(members=40, width=2)
    rankings = {tuple(sorted(range(40), key=lambda m: score(layer, m))) for _, score in SCORES.values()}
    assert len(rankings) == len(SCORES) - 1


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_flap_keeps_the_mean_output(width: int, bias: bool) -> None:
    layer = make_layer(width=width, bias=bias)
    dense = layer.X @ layer.W.double().T + (0.0 if layer.bias is None else layer.bias.double())
    *candidates, last = FlapPruner().candidates(layer.task(FlapPruner()), LEVELS)
    for candidate in candidates:
        columns = member_columns(candidate.kept, width)
        pruned = layer.X[:, columns] @ layer.W[:, columns].double().T + candidate.bias.double()
        torch.testing.assert_close(pruned.mean(0), dense.mean(0), rtol=1e-5, atol=1e-5)
        before = layer.X[:, columns] @ layer.W[:, columns].double().T
        assert (before.mean(0) - dense.mean(0)).abs().max() > 0.1  # there was something to make up for
    assert last.bias is None


def test_flap_without_compensation_has_no_bias() -> None:
    layer = make_layer(bias=True)
    pruner = FlapPruner(compensate=False)
    assert all(candidate.bias is None for candidate in pruner.candidates(layer.task(pruner), LEVELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype, bias=True)
    (candidate,) = FlapPruner().candidates(layer.task(FlapPruner()), [5])
    assert candidate.bias.dtype == dtype
    assert candidate.bias.shape == (6,)


def test_a_constant_input_is_made_up_for_in_full() -> None:
    layer = make_layer()
    layer.X[:, 3] = 100.0
    (candidate,) = FlapPruner().candidates(layer.task(FlapPruner()), [9])
    assert candidate.kept.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(candidate.bias, 100.0 * layer.W[:, 3])


PRUNERS: dict[str, Any] = {name: pruner for name, (pruner, _) in SCORES.items()} | {
    "magnitude": MagnitudeMembersPruner(),
    "taylor": TaylorPruner(),
}
LAYERS: dict[str, dict[str, Any]] = {
    "neurons": {"members": 70},
    "heads": {"members": 9, "width": 8},
    "dead neurons": {"members": 20, "dead": (0, 5, 19)},
    "dead heads": {"members": 6, "width": 4, "dead": (1, 4)},
    "all dead": {"dead": tuple(range(10))},
    "one token": {"tokens": 1},
    "one member": {"members": 1, "width": 5},
    "bias": {"bias": True},
    "bfloat16": {"dtype": torch.bfloat16, "width": 2, "bias": True},
}


SEEING = {name: pruner for name, pruner in PRUNERS.items() if name not in ("magnitude", "taylor")}
WITH_DEAD = {name: given for name, given in LAYERS.items() if "dead" in given}


@pytest.fixture(params=PRUNERS.values(), ids=PRUNERS)
def pruner(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.sampled
class TestEveryRanking:
    @pytest.fixture(params=LAYERS.values(), ids=LAYERS)
    def layer(self, request: pytest.FixtureRequest) -> Layer:
        return make_layer(**request.param)

    def levels(self, layer: Layer) -> list[int]:
        return sorted({max(0, layer.members - 1), *(layer.members * i // 8 for i in range(8))}, reverse=True)

    def test_levels_keep_what_was_asked_for_and_are_nested(self, pruner: Any, layer: Layer) -> None:
        candidates = pruner.candidates(layer.task(pruner), self.levels(layer))
        assert all(isinstance(candidate, Members) for candidate in candidates)
        assert [len(candidate.kept) for candidate in candidates] == self.levels(layer)
        for candidate in candidates:
            assert candidate.kept.dtype == torch.int64
            assert candidate.weight is None
            assert candidate.kept.tolist() == sorted({m for m in candidate.kept.tolist() if 0 <= m < layer.members})
        for more, fewer in zip(candidates, candidates[1:], strict=False):
            assert set(fewer.kept.tolist()) <= set(more.kept.tolist())

    @pytest.mark.parametrize("layer", WITH_DEAD.values(), ids=WITH_DEAD, indirect=True)
    def test_dead_members_go_first(self, pruner: Any, layer: Layer) -> None:
        dead = set((layer.X.abs().sum(0).view(layer.members, -1).sum(1) == 0).nonzero().flatten().tolist())
        assert dead
        for candidate in pruner.candidates(layer.task(pruner), self.levels(layer)):
            kept = set(candidate.kept.tolist())
            if len(kept) <= layer.members - len(dead):
                assert not kept & dead
            else:
                assert len(kept & dead) == len(kept) - (layer.members - len(dead))

    def test_runs_are_alike_and_leave_the_task_alone(self, pruner: Any, layer: Layer) -> None:
        task, W = layer.task(pruner), layer.W.clone()
        first, again = (pruner.candidates(task, self.levels(layer)) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.kept, b.kept)
            assert (a.bias is None and b.bias is None) or torch.equal(a.bias, b.bias)
        assert torch.equal(layer.W, W)

    def test_transposed_weights_give_the_same(self, pruner: Any, layer: Layer) -> None:
        """As those of GPT-2 are."""
        transposed = replace(layer, W=layer.W.T.contiguous().T)
        found = (pruner.candidates(one.task(pruner), self.levels(layer)) for one in (layer, transposed))
        for plain, other in zip(*found, strict=True):
            assert torch.equal(plain.kept, other.kept)
            assert plain.bias is None or torch.allclose(plain.bias, other.bias, rtol=1e-2, atol=1e-3)

    def test_activations_that_are_not_finite_are_refused(self, pruner: Any, layer: Layer) -> None:
        for value in (torch.nan, torch.inf):
            broken = replace(layer, X=layer.X.clone())
            broken.X[0, 0] = value
            with pytest.raises(
                InputError, match="^unit: (activations|weights, or the gradients of the survey,) are not finite"
            ):
                pruner.candidates(broken.task(pruner), [0])

    def test_no_levels_give_no_candidates(self, pruner: Any, layer: Layer) -> None:
        assert pruner.candidates(layer.task(pruner), []) == []


@pytest.mark.parametrize("pruner", SEEING.values(), ids=SEEING, indirect=True)
def test_any_split_into_batches_gives_the_same(pruner: Any) -> None:
    layer = make_layer(width=2)
    task = layer.task(pruner)
    whole = pruner.statistics(layer.W, 2)
    whole.add(layer.X)
    once = pruner.candidates(Task("unit", layer.W, whole, None, 2), LEVELS)
    for a, b in zip(pruner.candidates(task, LEVELS), once, strict=True):
        assert torch.equal(a.kept, b.kept)


def test_prunables_are_the_members(pruner: Any, family_model: PreTrainedModel) -> None:
    parts = sub_blocks(family_model)
    found = replace(pruner, multiple=16).prunables(parts)
    assert [prunable.name for prunable in found] == [part.name for part in parts]
    assert {(prunable.total, prunable.multiple) for prunable in found} == {(4, 1), (96, 16)}


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=30), data=st.data())
def test_of_equal_scores_the_first_stay(scores: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.integers(0, len(scores)), max_size=4).map(lambda counts: sorted(counts, reverse=True)))
    for count, members in zip(kept, best(torch.tensor(scores).float(), kept), strict=True):
        expected = sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:count]
        assert members.tolist() == sorted(expected)


def written_out_magnitudes(
    part: SubBlock, rows: dict[str, list[tuple[int, int]]], width: int, members: int
) -> list[float]:
    """Norms of each member's parameters; rows: layer -> (offset, rows a member) of each of its sections."""
    found = []
    for m in range(members):
        total = float(part.weight(part.column)[:, m * width : (m + 1) * width].double().square().sum())
        for layer, sections in rows.items():
            bias = part.bias(layer)
            for offset, count in sections:
                chosen = slice(offset + m * count, offset + (m + 1) * count)
                total += float(part.weight(layer)[chosen].double().square().sum())
                total += 0.0 if bias is None else float(bias[chosen].double().square().sum())
        found.append(total**0.5)
    return found


SEPARATE = {"q_proj": [(0, 16)], "k_proj": [(0, 8)], "v_proj": [(0, 8)]}, {"gate_proj": [(0, 1)], "up_proj": [(0, 1)]}
ROWS: dict[
    str, Any
] = {  # of a model of 4 KV groups, 8 query heads of 8 channels and 96 neurons; GPT-2 has 4 heads of 16
    "llama": SEPARATE,
    "llama_with_biases": SEPARATE,
    "phi3": ({"qkv_proj": [(0, 16), (64, 8), (96, 8)]}, {"gate_up_proj": [(0, 1), (96, 1)]}),
    "gpt2": ({"c_attn": [(0, 16), (64, 16), (128, 16)]}, {"c_fc": [(0, 1)]}),
}


@pytest.mark.parametrize("name", ROWS)
def test_magnitudes_count_all_that_goes_with_a_member(model_of: Callable[..., PreTrainedModel], name: str) -> None:
    for part in sub_blocks(model_of(name)):
        width, members = (16, 4) if part.kind == "attention" else (1, 96)
        expected = written_out_magnitudes(part, ROWS[name][part.kind != "attention"], width, members)
        torch.testing.assert_close(magnitudes(part), torch.tensor(expected), rtol=1e-5, atol=0.0)


def test_surveys(family_model: PreTrainedModel, ids: Tensor) -> None:
    calibration = Calibration(ids)
    parts = sub_blocks(family_model)
    found = MagnitudeMembersPruner().survey(family_model, calibration, CPU, track)
    assert list(found) == [part.name for part in parts]
    assert all(torch.equal(found[part.name], magnitudes(part)) for part in parts)
    found = TaylorPruner().survey(family_model, calibration, CPU, track)
    expected = member_saliencies(family_model, parts, calibration, CPU, track)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for pruner in (WandaSpPruner(), FlapPruner(), AmpPruner()):
        assert pruner.survey(family_model, calibration, CPU, track) == {}


def test_surveys_of_query_heads(tiny_llama: LoadedModel, ids: Tensor) -> None:
    for pruner in (MagnitudeMembersPruner(query_heads=True), TaylorPruner(query_heads=True)):
        totals = {prunable.name: prunable.total for prunable in pruner.prunables(sub_blocks(tiny_llama.model))}
        found = pruner.survey(tiny_llama.model, Calibration(ids), CPU, track)
        assert totals["model.layers.0.self_attn"] == 8
        assert {name: len(scores) for name, scores in found.items()} == totals


def test_what_surveys_cost() -> None:
    calibration = Calibration(torch.zeros(6, 10, dtype=torch.int64))
    costs = [
        pruner.survey_tokens(calibration) for pruner in (MagnitudeMembersPruner(), WandaSpPruner(), TaylorPruner())
    ]
    assert costs == [0, 0, 4 * 60]


def test_scores_that_are_missing_are_a_clear_error() -> None:
    with pytest.raises(InputError, match="unit: the survey of the dense model has no scores"):
        TaylorPruner().candidates(Task("unit", torch.ones(2, 4)), [1])


def test_a_model_without_members_has_no_scores(mixer_model: PreTrainedModel, ids: Tensor) -> None:
    assert MagnitudeMembersPruner().survey(mixer_model, Calibration(ids), CPU, track) == {}
