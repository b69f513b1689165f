"""Pruning of single weights against brute force in float64, and what every such pruner must keep to."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from omegaconf import OmegaConf
from torch import Tensor

from local_prune.methods import gblm
from local_prune.methods.apt import AptPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.magnitude import MagnitudePruner
from local_prune.methods.shared import blockwise, weights
from local_prune.methods.shared.blockwise import BlockwisePruner
from local_prune.methods.shared.ranking import rank_in_rows
from local_prune.methods.shared.weights import ScoredPruner, pattern_of
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import Calibration, Pruner, Task
from local_prune.statistics import LeastSquares, Moments
from supernet.candidates import Candidate
from supernet.errors import InputError
from supernet.models.prunables import Pattern

MakeLayer = Callable[..., Any]


TIED = st.lists(st.integers(0, 3), min_size=12, max_size=12)


@given(st.lists(TIED, min_size=1, max_size=4), st.data())
def test_rows_lose_equal_numbers(values: list[list[int]], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    rank = rank_in_rows(scores)
    assert sorted(rank.flatten().tolist()) == list(range(scores.numel()))
    kept = data.draw(st.integers(0, scores.numel()))
    mask = rank >= scores.numel() - kept
    counts = mask.sum(1)
    assert int(counts.max() - counts.min()) <= 1
    for row, chosen in zip(scores, mask, strict=True):
        assert chosen.all() or not chosen.any() or row[chosen].min() >= row[~chosen].max()


# Scores.


def moments(X: Tensor) -> Moments:
    sums = Moments.zeros(X.shape[1])
    for part in X.split(77):
        sums.add(part)
    return sums


def gradients_of(case: Any) -> Tensor:
    living = case.X.abs().sum(0) > 0  # dead inputs have no gradients
    return torch.rand(case.dense.shape, generator=torch.Generator().manual_seed(5)) * 0.1 * living


def task_of(pruner: Pruner, case: Any) -> Task:
    made = pruner.statistics(case.dense, 1)
    statistics = case.problem if isinstance(made, LeastSquares) else None if made is None else moments(case.X)
    return Task("unit", case.dense, statistics, gradients_of(case) if isinstance(pruner, GblmPruner) else None)


def reference_scores(pruner: Pruner, case: Any) -> list[list[float]]:
    W, norms, g = case.dense.double(), case.X.norm(dim=0), gradients_of(case).double()
    table = []
    for i in range(W.shape[0]):
        row = []
        for j in range(W.shape[1]):
            w = abs(float(W[i, j]))
            score = w if isinstance(pruner, MagnitudePruner) else w * float(norms[j])
            row.append(score + (pruner.gradient_weight * w * float(g[i, j]) if isinstance(pruner, GblmPruner) else 0.0))
        table.append(row)
    return table


SCORED = {"magnitude": MagnitudePruner, "wanda": WandaPruner, "gblm": GblmPruner}


@pytest.mark.parametrize("kind", SCORED.values(), ids=SCORED)
def test_the_best_scores_stay(kind: type[Any], layer: MakeLayer) -> None:
    case, pruner = layer(members=20, d_out=7), kind()
    scores = reference_scores(pruner, case)
    for count, candidate in zip((91, 70), pruner.candidates(task_of(pruner, case), [91, 70]), strict=True):
        if kind is MagnitudePruner:
            expected = sorted((s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row))[140 - count :]
        else:
            expected = [
                x
                for i, row in enumerate(scores)
                for x in sorted((s, i, j) for j, s in enumerate(row))[20 - count // 7 :]
            ]
        assert {(i, j) for _, i, j in expected} == {(i, j) for i, j in candidate.mask.nonzero().tolist()}


@pytest.mark.parametrize("text", ["2:4", "1:5", "7:10"])
@pytest.mark.parametrize("kind", SCORED.values(), ids=SCORED)
def test_the_best_of_each_group_stay(
    kind: type[Any], text: str, layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PAIRS", 300)  # several chunks of groups
    case, pruner, pattern = layer(members=20, d_out=7), kind(text), Pattern.parse(text)
    scores = reference_scores(pruner, case)
    (candidate,) = pruner.candidates(task_of(pruner, case), [pattern.kept(140)])
    for i, row in enumerate(scores):
        for start in range(0, 20, pattern.of):
            best = sorted(range(start, start + pattern.of), key=lambda j: row[j])[-pattern.keep :]
            group = candidate.mask[i, start : start + pattern.of].nonzero().flatten() + start
            assert group.tolist() == sorted(best)


@pytest.mark.parametrize("norm", [1, 2])
def test_gblm_surveys_the_norm_that_is_asked_for(model_of: Callable[..., Any], norm: int) -> None:
    model = model_of("llama", num_hidden_layers=1)
    ids = torch.randint(97, (3, 10), generator=torch.Generator().manual_seed(0))
    total: dict[str, Tensor] = {}
    for sequence in ids.split(1):  # of the mean loss of each
        model.requires_grad_(True).zero_grad()
        with torch.enable_grad():
            model(sequence, labels=sequence).loss.backward()
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
            gradient = model.get_submodule(name).weight.grad
            total[name] = total.get(name, 0) + (gradient.abs() if norm == 1 else gradient.square())
    model.requires_grad_(False)
    calibration = Calibration(ids, 2)
    found = GblmPruner(norm=norm).survey(model, calibration, torch.device("cpu"), lambda items, title: items)
    assert len(found) == 7
    for name, summed in total.items():
        expected = 3**0.5 * (summed if norm == 1 else summed.sqrt())
        torch.testing.assert_close(found[name] / found[name].mean(), expected / expected.mean(), rtol=1e-3, atol=1e-4)
    assert GblmPruner().survey_tokens(calibration) > ids.numel()


def test_gblm_needs_gradients_that_are_numbers(layer: MakeLayer) -> None:
    case = layer()
    with pytest.raises(InputError, match="unit: gblm needs the gradients"):
        GblmPruner().candidates(Task("unit", case.dense, moments(case.X)), [4])
    with pytest.raises(InputError, match="unit: gradients are not finite"):
        GblmPruner().candidates(Task("unit", case.dense, moments(case.X), case.dense / 0), [4])


@pytest.mark.parametrize("sequences", [1, 6])
def test_gblm_weighs_activations_and_gradients_as_the_authors_do(
    sequences: int, layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the squared norms are a running mean over the sequences, of sums over tokens, and gradients a sum."""
    case = layer(members=60, tokens=120)
    gradients = gradients_of(case)
    monkeypatch.setattr(gblm, "weight_gradient_norms", lambda *given: {"unit": gradients.clone()})
    pruner = GblmPruner(gradient_weight=30.0)
    survey = pruner.survey(None, Calibration(torch.zeros(sequences, 20, dtype=torch.int64)), None, None)  # type: ignore[arg-type]
    scaler_row = torch.zeros(60, dtype=torch.float64)
    for count, X in enumerate(case.X.chunk(sequences)):
        scaler_row *= count / (count + 1)
        scaler_row += X.norm(dim=0) ** 2 / (count + 1)
    scores = case.dense.double().abs() * (scaler_row.sqrt() + 30.0 * gradients)
    (candidate,) = pruner.candidates(Task("unit", case.dense, moments(case.X), survey["unit"]), [180])
    expected = torch.zeros(6, 60, dtype=torch.bool).scatter_(1, scores.topk(30, 1).indices, True)
    assert torch.equal(candidate.mask, expected)
    # what differs from it with many sequences
    sums = case.dense.double().abs() * (case.X.norm(dim=0) + 30.0 * gradients)
    other = torch.zeros(6, 60, dtype=torch.bool).scatter_(1, sums.topk(30, 1).indices, True)
    assert torch.equal(other, expected) == (sequences == 1)


# Settings.

BAD = [
    (MagnitudePruner, {"pattern": "4:2"}, "pattern=4:2 is not N:M"),
    (MagnitudePruner, {"pattern": ["2:4", "x"]}, "pattern=x is not N:M"),
    (WandaPruner, {"pattern": 124}, "pattern=124 is a number; quote"),
    (WandaPruner, {"pattern": ["2:4", "4:8"]}, "two patterns of the same density"),
    (WandaPruner, {"pattern": []}, r"pattern=\[\] names no pattern; leave it null for unstructured"),
    (GblmPruner, {"gradient_weight": -1.0}, "gradient_weight=-1.0 must be finite and not below 0; 100"),
    (GblmPruner, {"gradient_weight": math.nan}, "gradient_weight=nan must be finite and not below 0; 100"),
    (GblmPruner, {"gradient_weight": math.inf}, "gradient_weight=inf must be finite and not below 0; 100"),
    (GblmPruner, {"norm": 3}, "norm=3 must be 1 or 2"),
    (SparseGptPruner, {"damping": 0.0}, "damping=0.0 must be finite and above 0; 0.01 is the usual choice"),
    (SparseGptPruner, {"block": 0}, "block=0 must be at least 1"),
    (SparseGptPruner, {"damping": math.inf}, "damping=inf must be finite and above 0"),
    (AptPruner, {"damping": -1.0}, "damping=-1.0 must be finite and above 0"),
    (AptPruner, {"damping": math.nan}, "damping=nan must be finite and above 0"),
    (AptPruner, {"pattern": "2"}, "pattern=2 is not N:M"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), BAD, ids=str)
def test_impossible_settings_are_refused(kind: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**settings)


def test_a_pattern_is_found_by_what_it_keeps() -> None:
    patterns = WandaPruner(OmegaConf.create(["3:4", "2:4"])).patterns  # type: ignore[arg-type]
    assert patterns == (Pattern(3, 4), Pattern(2, 4))
    assert [pattern_of(kept, 48, patterns).keep for kept in (36, 24)] == [3, 2]
    with pytest.raises(InputError, match="keeps 25 of 48"):
        pattern_of(25, 48, patterns)


# What every pruner of weights keeps to: add new ones to this list.
KINDS: dict[str, Callable[..., Any]] = {**SCORED, "sparsegpt": SparseGptPruner, "apt": AptPruner}
PATTERNS: tuple[Any, ...] = (None, "2:4", "4:8", "1:3", ("3:4", "1:3", "1:4"))
UNSTRUCTURED: dict[str, Any] = {
    f"{name} {pattern}": kind(pattern) for name, kind in KINDS.items() for pattern in PATTERNS
}
UNSTRUCTURED |= {f"{kind.__name__} in small blocks": kind(block=10) for kind in (SparseGptPruner, AptPruner)}
UNSTRUCTURED |= {f"{kind.__name__} 1:3 in small blocks": kind("1:3", block=10) for kind in (SparseGptPruner, AptPruner)}
LAYERS: dict[str, dict[str, Any]] = {
    "correlated": {"members": 48, "d_out": 16, "tokens": 300},
    "another target": {"shift": 3.0},
    "dead inputs": {"dead": (0, 5, 6, 8, 9, 10, 11, 23)},
    "fewer tokens than inputs": {"members": 72, "tokens": 25},
    "one token": {"tokens": 1},
    "all inputs dead": {"dead": tuple(range(24))},
    "one output": {"d_out": 1},
}


def levels_of(pruner: Any, dense: Tensor) -> list[int]:
    total = dense.numel()
    if pruner.patterns:
        return sorted((pattern.kept(total) for pattern in pruner.patterns), reverse=True)
    return sorted(
        {total - 1, 0, 7, total // 2 + 1, *(len(dense) * k for k in range(3, dense.shape[1], 5))}, reverse=True
    )


def output_error(case: Any, weight: Tensor) -> float:
    return float((case.X @ weight.double().T - case.T).square().sum() / case.T.square().sum())


def final_weight(case: Any, candidate: Candidate) -> Tensor:
    return case.dense * candidate.mask if candidate.weight is None else candidate.weight


SCORING = {name: pruner for name, pruner in UNSTRUCTURED.items() if isinstance(pruner, ScoredPruner)}
SEEING = {name: pruner for name, pruner in UNSTRUCTURED.items() if not isinstance(pruner, MagnitudePruner)}
WITH_OUTPUT = {name: given for name, given in LAYERS.items() if name != "all inputs dead"}
WITH_DEAD = {name: given for name, given in LAYERS.items() if "dead" in given}


@pytest.fixture(scope="module", params=UNSTRUCTURED.values(), ids=UNSTRUCTURED)
def pruner(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.sampled
class TestEveryPruner:
    @pytest.fixture(scope="module", params=LAYERS.values(), ids=LAYERS)
    @staticmethod
    def case(request: pytest.FixtureRequest, layer: MakeLayer) -> Any:
        return layer(**request.param)

    @pytest.fixture(scope="module")
    @staticmethod
    def candidates(pruner: Any, case: Any) -> list[Candidate]:
        """Of a pruner and a case, made once for all tests. Not to be changed."""
        return pruner.candidates(task_of(pruner, case), levels_of(pruner, case.dense))

    def test_every_level_keeps_what_was_asked_for(self, pruner: Any, case: Any, candidates: list[Candidate]) -> None:
        levels = levels_of(pruner, case.dense)
        assert [int(candidate.mask.sum()) for candidate in candidates] == levels
        for candidate, count in zip(candidates, levels, strict=True):
            assert candidate.mask.dtype == torch.bool
            assert candidate.mask.shape == case.dense.shape
            assert candidate.mask.is_contiguous()
            if pruner.patterns:
                pattern = pattern_of(count, case.dense.numel(), pruner.patterns)
                assert (candidate.mask.view(-1, pattern.of).sum(1) == pattern.keep).all()
            assert (candidate.weight is None) == isinstance(pruner, ScoredPruner)
            if candidate.weight is not None:
                assert candidate.weight.isfinite().all()
                assert not candidate.weight[~candidate.mask].any()

    @pytest.mark.parametrize("pruner", SCORING.values(), ids=SCORING, indirect=True)
    def test_those_without_weights_are_nested(self, pruner: Any, case: Any, candidates: list[Candidate]) -> None:
        levels = levels_of(pruner, case.dense)
        sizes = [pattern_of(kept, case.dense.numel(), pruner.patterns).of if pruner.patterns else 0 for kept in levels]
        for size in set(sizes):
            alike = [candidate for candidate, its in zip(candidates, sizes, strict=True) if its == size]
            assert all(candidate.weight is None for candidate in alike)
            for more, fewer in zip(alike, alike[1:], strict=False):
                assert not (fewer.mask & ~more.mask).any()

    @pytest.mark.parametrize("case", WITH_OUTPUT.values(), ids=WITH_OUTPUT, indirect=True)
    def test_errors_are_not_below_the_optimum(self, case: Any, candidates: list[Candidate]) -> None:
        assert case.T.any() and len(candidates)
        for candidate in candidates[::2]:
            masked = case.X * candidate.mask.unsqueeze(1)  # (d_out, tokens, d_in): each output has its own support
            best = torch.linalg.lstsq(masked, case.T.T.unsqueeze(2), driver="gelsd").solution.squeeze(2)
            assert output_error(case, final_weight(case, candidate)) >= output_error(case, best) * (1 - 1e-3) - 1e-9

    @pytest.mark.parametrize("pruner", SEEING.values(), ids=SEEING, indirect=True)
    @pytest.mark.parametrize("case", WITH_DEAD.values(), ids=WITH_DEAD, indirect=True)
    def test_dead_inputs_get_no_weight_and_go_first(self, pruner: Any, case: Any, candidates: list[Candidate]) -> None:
        dead = case.X.abs().sum(0) == 0
        assert dead.any()
        for candidate in candidates:
            if candidate.weight is not None:
                assert not candidate.weight[:, dead].any()
            if pruner.patterns:
                of = pattern_of(int(candidate.mask.sum()), case.dense.numel(), pruner.patterns).of
                kept, gone = (
                    candidate.mask.view(len(case.dense), -1, of),
                    (~candidate.mask & ~dead).view(len(case.dense), -1, of),
                )
                assert not ((kept & dead.view(-1, of)).any(2) & gone.any(2)).any()
        if not pruner.patterns:
            room = len(case.dense) * int((~dead).sum())
            few = [candidate for candidate in candidates if int(candidate.mask.sum()) <= room]
            assert few and not any(candidate.mask[:, dead].any() for candidate in few)

    def test_runs_are_alike_and_leave_the_task_alone(self, pruner: Any, case: Any, candidates: list[Candidate]) -> None:
        task = task_of(pruner, case)
        held = [case.dense, case.problem.upper, case.problem.moment, *([] if task.scores is None else [task.scores])]
        held += [task.statistics.squares] if isinstance(task.statistics, Moments) else []
        before = [tensor.clone() for tensor in held]
        again = pruner.candidates(task, levels_of(pruner, case.dense))
        assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
        for first, second in zip(candidates, again, strict=True):
            assert torch.equal(first.mask, second.mask)
            assert torch.equal(final_weight(case, first), final_weight(case, second))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_weights_have_the_dtype_of_the_dense_one(self, pruner: Any, layer: MakeLayer, dtype: torch.dtype) -> None:
        case = layer(members=48, dtype=dtype)
        candidates = pruner.candidates(task_of(pruner, case), levels_of(pruner, case.dense))
        errors = [output_error(case, final_weight(case, candidate)) for candidate in candidates]
        assert errors == sorted(errors)
        for candidate in candidates:
            if candidate.weight is not None:
                assert candidate.weight.dtype == dtype
                assert candidate.weight.is_contiguous()

    def test_transposed_weights_give_the_same(self, pruner: Any, layer: MakeLayer) -> None:
        """As those of GPT-2 are."""
        case = layer(members=48, d_out=16, tokens=300)
        transposed = replace(case, dense=case.dense.T.contiguous().T)
        found = (pruner.candidates(task_of(pruner, one), levels_of(pruner, case.dense)) for one in (case, transposed))
        for plain, other in zip(*found, strict=True):
            assert torch.equal(plain.mask, other.mask)
            assert other.mask.is_contiguous()
            torch.testing.assert_close(final_weight(case, plain), final_weight(case, other), rtol=1e-4, atol=1e-5)

    def test_no_levels_give_no_candidates(self, pruner: Any, layer: MakeLayer) -> None:
        assert pruner.candidates(task_of(pruner, layer()), []) == []

    @pytest.mark.parametrize("pruner", SEEING.values(), ids=SEEING, indirect=True)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_activations_that_are_not_finite_are_named(self, pruner: Any, layer: MakeLayer, value: float) -> None:
        case, X = layer(), torch.full((3, 24), value)
        task = task_of(pruner, case)
        task.statistics.add(*[X, X[:, :6]][: 2 if isinstance(task.statistics, LeastSquares) else 1])
        with pytest.raises(InputError, match="^unit: activations are not finite"):
            pruner.candidates(task, levels_of(pruner, case.dense))

    def test_statistics_and_prunables_are_those_of_the_layer(self, pruner: Any) -> None:
        dense = torch.zeros(6, 24)
        made = pruner.statistics(dense, 1)
        if isinstance(made, LeastSquares):
            assert made.moment.shape == (24, 6)
        elif made is not None:
            assert made.squares.shape == (24,)
        part = SimpleNamespace(name="mlp", stages=(("up",), ("down",)), weight=lambda layer: dense)
        prunables = pruner.prunables([part])
        assert [prunable.name for prunable in prunables] == ["mlp.up", "mlp.down"]
        if pruner.patterns:
            assert [level.kept for level in prunables[0].choices] == [144, *levels_of(pruner, dense)]
        if not isinstance(pruner, GblmPruner):
            assert pruner.survey(None, None, None, None) == {}
            assert pruner.survey_tokens(None) == 0


LEAST_SQUARES = {name: pruner for name, pruner in UNSTRUCTURED.items() if isinstance(pruner, BlockwisePruner)}


@pytest.mark.parametrize("pruner", LEAST_SQUARES.values(), ids=LEAST_SQUARES)
def test_errors_are_below_those_of_wanda(pruner: Any, layer: MakeLayer) -> None:
    case = layer(members=96, d_out=32, tokens=600)
    kept = [k for k in levels_of(pruner, case.dense) if 0 < k < case.dense.numel() - 1]
    plain = WandaPruner(pruner.pattern)
    pairs = zip(
        pruner.candidates(task_of(pruner, case), kept), plain.candidates(task_of(plain, case), kept), strict=True
    )
    for fitted, other in pairs:
        assert output_error(case, fitted.weight) < output_error(case, final_weight(case, other))


@pytest.mark.parametrize(
    "name", ["sparsegpt None", "apt None", "sparsegpt ('3:4', '1:3', '1:4')", "apt ('3:4', '1:3', '1:4')"]
)
def test_levels_do_not_depend_on_those_they_run_with(
    name: str, layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, pruner = layer(members=48, d_out=16), UNSTRUCTURED[name]
    kept, task = levels_of(pruner, case.dense), task_of(pruner, case)
    together = pruner.candidates(task, kept)
    monkeypatch.setattr(blockwise, "WORKING", 1)
    for first, second in zip(together, pruner.candidates(task, kept), strict=True):
        assert torch.equal(first.mask, second.mask)
        torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)
