"""The walk sees what the pruned model computes, fits what it says, and can be interrupted anywhere."""

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from local_prune.statistics import LeastSquares
from local_prune.structured import ObsPruner
from local_prune.walk import FITS, Calibration, Pruner, build, mean_projection
from search.models import LoadedModel
from supernet.architecture import ATTENTION, MLP, SubBlock, entry, sub_blocks
from supernet.assemble import assemble
from supernet.encoding import Candidate, member_columns
from supernet.errors import InputError
from supernet.space import Space, unit_of
from supernet.store import Supernet

KEPT = {ATTENTION: (4, 3, 1), MLP: (256, 160, 32)}
IDS = torch.randint(257, (5, 16), generator=torch.Generator().manual_seed(3))
CHOSEN = (1, 2, 0, 1, 2, 2, 1, 1)  # levels of the eight units, for exact error accumulation


@pytest.fixture
def model(tiny_llama: LoadedModel) -> PreTrainedModel:
    return tiny_llama.model


class InterruptionError(Exception):
    """As by a signal."""


@dataclass
class Recorder:
    """A pruner that notes the problems it was given, and fails at the unit that comes after `units` of them."""

    units: int = 100
    problems: dict[str, LeastSquares] = field(default_factory=dict)

    def candidates(self, problem: LeastSquares, dense: Tensor, kept: Sequence[int], width: int, where: str) -> list[Candidate]:
        if len(self.problems) == self.units:
            raise InterruptionError
        self.problems[where] = problem
        return ObsPruner().candidates(problem, dense, kept, width, where)


def built(
    model: PreTrainedModel,
    root: Path,
    levels: Sequence[Sequence[float]] | None = None,
    pruner: Pruner | None = None,
    batch: int = 2,
    fit: str = "pruned",
    kept: dict[str, tuple[int, ...]] = KEPT,
    ids: Tensor = IDS,
) -> Supernet:
    """A supernet of the model; `levels` are the mixture's weights a unit, by default as much of each level."""
    parts = sub_blocks(model)
    space = Space(tuple(unit_of(part, kept[part.kind]) for part in parts))
    mixture = {
        unit.name: [1 / len(unit.levels)] * len(unit.levels) if levels is None else levels[index]
        for index, unit in enumerate(space.units)
    }
    supernet = Supernet.open_or_create(root, space, {"mixture": mixture, "fit": fit})
    build(model, Calibration(ids, batch, fit), pruner or ObsPruner(), supernet, mixture, "cpu", untracked, "")
    return supernet


def untracked(parts: Sequence[SubBlock], title: str) -> Iterable[SubBlock]:
    return parts


def on_one(level: int, count: int = 3) -> list[float]:
    return [float(index == level) for index in range(count)]


EXACT = [on_one(level) for level in CHOSEN]


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Any:
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].double())) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def streams(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """By hooks on a whole forward pass: the residual stream before every sub-block and behind the last, and projection inputs."""
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    projections = [p for layer in layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    with inputs_of([*norms, model.model.norm]) as residual, inputs_of(projections) as inputs:
        model(IDS)
    return [r.flatten(0, 1) for r in residual], [X.flatten(0, 1) for X in inputs]


@pytest.mark.parametrize("fit", FITS)
def test_each_fit_solves_its_problem_on_the_pruned_models_own_inputs(model: PreTrainedModel, tmp_path: Path, fit: str) -> None:
    recorder = Recorder()
    supernet = built(model, tmp_path, EXACT, recorder, fit=fit)
    dense_stream, dense_inputs = streams(model)
    for index, part in enumerate(sub_blocks(model)):
        prefix = [*CHOSEN[:index], *[0] * (len(CHOSEN) - index)]
        stream, inputs = streams(assemble(model, supernet, prefix))
        X, W = inputs[index], part.projection.weight.double().T
        T = {
            "pruned": X @ W,
            "dense": dense_inputs[index] @ W,
            "residual": dense_stream[index + 1] - stream[index],
        }[fit]
        problem = recorder.problems[part.name]
        assert problem.tokens == IDS.numel()
        torch.testing.assert_close(problem.hessian.double(), X.T @ X, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(problem.moment.double(), X.T @ T, rtol=1e-3, atol=1e-2)
        assert problem.energy == pytest.approx(float(T.square().sum()), rel=1e-3)

        H, G = X.T @ X, X.T @ T
        ridge = 0.01 * H.diagonal().mean()
        for level in (1, 2):
            candidate = supernet.candidate(index, level)
            columns = member_columns(candidate.kept, part.width)
            solution = candidate.weight.double().T
            left = H[columns][:, columns] @ solution + ridge * solution
            torch.testing.assert_close(left, G[columns] + ridge * W[columns], rtol=1e-2, atol=1e-2 * float(G.abs().max()))
        errors = supernet.manifest["units"][part.name]["errors"]
        columns = member_columns(supernet.candidate(index, 2).kept, part.width)
        output = X[:, columns] @ supernet.candidate(index, 2).weight.double().T
        assert errors[1] == pytest.approx(float((output - T).square().sum() / T.square().sum()), rel=1e-2, abs=1e-5)


def test_the_fits_differ(model: PreTrainedModel, tmp_path: Path) -> None:
    weights = [built(model, tmp_path, EXACT, fit=fit).candidate(3, 1).weight for fit in FITS]
    assert not torch.allclose(weights[0], weights[1], rtol=1e-2) and not torch.allclose(weights[1], weights[2], rtol=1e-2)


@pytest.mark.parametrize("fit", FITS)
def test_the_batch_size_does_not_matter(family_model: PreTrainedModel, tmp_path: Path, fit: str) -> None:
    """Of five sequences the last batch is short, and has a mask of its own."""
    on_dense = [on_one(0)] * 6  # so that rounding cannot change what is kept on the way
    recorders = {batch: Recorder() for batch in (5, 2, 50)}
    for batch, recorder in recorders.items():
        kept = {ATTENTION: (4, 3, 1), MLP: (96, 64, 32)}
        built(family_model, tmp_path / str(batch), on_dense, recorder, batch=batch, fit=fit, kept=kept, ids=IDS % 97)
    for name, whole in recorders[5].problems.items():
        for problem in (recorders[2].problems[name], recorders[50].problems[name]):
            torch.testing.assert_close(problem.hessian, whole.hessian, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(problem.moment, whole.moment, rtol=1e-3, atol=1e-2)


def test_what_comes_next_sees_the_mean_over_levels(model: PreTrainedModel, tmp_path: Path) -> None:
    recorder = Recorder()
    weights = [0.5, 0.2, 0.3]
    supernet = built(model, tmp_path, [weights] * 8, recorder)
    runs = [streams(assemble(model, supernet, [level, *[0] * 7])) for level in range(3)]
    stream = sum(weight * run[0][1] for weight, run in zip(weights, runs, strict=True))  # behind the first attention
    layer = model.model.layers[0]
    with torch.no_grad():
        normed = layer.post_attention_layernorm(stream.float())
        X = (nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)).double()
    second = recorder.problems[supernet.space.units[1].name]
    torch.testing.assert_close(second.hessian.double(), X.T @ X, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_mean_projection_gives_the_mean_output(family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor) -> None:
    weights = [0.4, 0.3, 0.2, 0.1]  # the last level drops the sub-block, and its bias with it
    hidden, contexts = entry(family_model, ids)
    for index, part in enumerate(sub_blocks(family_model)):
        X = part.projection_inputs(hidden, contexts[part.block])
        candidates = family_supernet.weights(index)
        weight, bias = mean_projection(part, candidates, weights)
        expected = weights[0] * part.projection(X)
        for level, candidate in candidates.items():
            columns = member_columns(candidate.kept, part.width)
            present = part.projection.bias if len(candidate.kept) else None
            expected += weights[level] * nn.functional.linear(X[:, columns], candidate.weight, present)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(nn.functional.linear(X, weight, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_dropped_sub_blocks_leave_the_stream_alone(model: PreTrainedModel, tmp_path: Path, fit: str) -> None:
    recorder = Recorder()
    built(model, tmp_path, [on_one(1, 2)] * 8, recorder, fit=fit, kept={ATTENTION: (4, 0), MLP: (256, 0)})
    first, last = (recorder.problems[f"model.layers.{block}.self_attn"] for block in (0, 3))
    assert last.tokens == first.tokens
    part = sub_blocks(model)[6]
    with torch.no_grad():
        hidden, contexts = entry(model, IDS)
        X = part.projection_inputs(hidden, contexts[3]).double()  # of the embeddings
    torch.testing.assert_close(last.hessian.double(), X.T @ X, rtol=1e-3, atol=1e-3)


def unit_files(supernet: Supernet) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((supernet.path / "units").iterdir())}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("units", [0, 1, 4, 7])
def test_an_interrupted_build_ends_as_an_undisturbed_one(model: PreTrainedModel, tmp_path: Path, fit: str, units: int) -> None:
    expected = unit_files(built(model, tmp_path / "undisturbed", fit=fit))
    names = [part.name for part in sub_blocks(model)]
    with pytest.raises(InterruptionError):
        built(model, tmp_path / "interrupted", pruner=Recorder(units), fit=fit)
    rest = Recorder()
    supernet = built(model, tmp_path / "interrupted", pruner=rest, fit=fit)
    assert list(rest.problems) == names[units:]  # what was there is not built again
    assert supernet.complete
    assert unit_files(supernet) == expected


def test_a_finished_supernet_is_not_touched(model: PreTrainedModel, tmp_path: Path) -> None:
    first = built(model, tmp_path)
    model.model.embed_tokens.weight.data.fill_(torch.nan)  # would be seen by any pass over the text
    again = built(model, tmp_path, pruner=Recorder(0))
    assert unit_files(again) == unit_files(first)


def test_a_build_finds_what_another_process_has_finished_meanwhile(model: PreTrainedModel, tmp_path: Path) -> None:
    """The loser of a race opened the supernet before the winner had written anything."""
    parts = sub_blocks(model)
    space = Space(tuple(unit_of(part, KEPT[part.kind]) for part in parts))
    mixture = {unit.name: on_one(1) for unit in space.units}
    winner, loser = (Supernet.open_or_create(tmp_path, space, {}) for _ in range(2))
    build(model, Calibration(IDS), ObsPruner(), winner, mixture, "cpu", untracked, "")
    build(model, Calibration(IDS), Recorder(0), loser, mixture, "cpu", untracked, "")
    assert loser.complete
    assert torch.equal(loser.candidate(0, 1).weight, winner.candidate(0, 1).weight)


def test_the_model_stays_as_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    built(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_is_drawn_over_all_sub_blocks(model: PreTrainedModel, tmp_path: Path) -> None:
    drawn: list[str] = []

    def track(parts: Sequence[SubBlock], title: str) -> Iterable[SubBlock]:
        for part in parts:
            drawn.append(f"{title} {part.name}")
            yield part

    space = Space(tuple(unit_of(part, KEPT[part.kind]) for part in sub_blocks(model)))
    supernet = Supernet.open_or_create(tmp_path, space, {})
    mixture = {unit.name: on_one(0) for unit in space.units}
    build(model, Calibration(IDS), ObsPruner(), supernet, mixture, "cpu", track, "build")
    assert drawn == [f"build {unit.name}" for unit in space.units]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fit": "dens"}, "prune.fit=dens is not known; choose one of pruned, dense, residual"), ({"batch": 0}, "prune.batch=0")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(IDS, **settings)


def test_bfloat16(model: PreTrainedModel, tmp_path: Path) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    supernet = built(model, tmp_path)
    candidate = supernet.candidate(7, 2)
    assert candidate.weight.dtype == torch.bfloat16
    assert all(0 <= e < 1 for entry in supernet.manifest["units"].values() for e in entry["errors"])
