"""What every local pruner keeps to, on whole models: add new ones to `PRUNERS`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.amp import AmpPruner
from local_prune.methods.apt import AptPruner
from local_prune.methods.bonsai import BonsaiPruner
from local_prune.methods.depth import DepthPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.magnitude import MagnitudePruner
from local_prune.methods.magnitude_sp import MagnitudeMembersPruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.rtn import RtnPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.taylor import TaylorPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.methods.wanda_sp import WandaSpPruner
from local_prune.pruner import Calibration, Pruner
from local_prune.statistics import LeastSquares
from supernet.candidates import Members, Weights, count, member_columns
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import assemble
from supernet.models.forward import entry, final_norm_and_head
from supernet.models.placement import Place, full_weight, places
from supernet.space import Space, Unit
from supernet.store import Supernet

IDS = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(3))
OTHER_IDS = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(4))

STRUCTURED: dict[str, Pruner] = {
    "obs": ObsPruner(multiple=8),
    "obs with the first-order term": ObsPruner(first_order=1.0, multiple=8),
    "obs by query heads": ObsPruner(multiple=8, query_heads=True),
    "magnitude of members": MagnitudeMembersPruner(8),
    "wanda_sp": WandaSpPruner(8),
    "flap": FlapPruner(8),
    "flap without compensation": FlapPruner(8, compensate=False),
    "taylor": TaylorPruner(8),
    "taylor by query heads": TaylorPruner(8, query_heads=True),
    "amp": AmpPruner(8),
    "bonsai": BonsaiPruner(8, samples=8, drop=0.2),
}
UNSTRUCTURED: dict[str, Callable[..., Pruner]] = {
    "magnitude": MagnitudePruner,
    "wanda": WandaPruner,
    "gblm": GblmPruner,
    "sparsegpt": SparseGptPruner,
    "apt": AptPruner,
}
PATTERNS = {"": None, " 2:4": "2:4", " of several patterns": ("3:4", "2:4")}
LINEAR: dict[str, Pruner] = {
    f"{n}{title}": kind(p) for n, kind in UNSTRUCTURED.items() for title, p in PATTERNS.items()
}
LINEAR |= {"rtn": RtnPruner([4, 2], 16), "gptq": GptqPruner([4, 2], 16)}
DEPTH: dict[str, Pruner] = {"depth": DepthPruner(), "depth of whole blocks": DepthPruner(whole_blocks=True)}
PRUNERS = STRUCTURED | LINEAR | DEPTH

CASES = [("llama", name) for name in PRUNERS] + [("mamba", name) for name in LINEAR | DEPTH]


@dataclass(frozen=True)
class Case:
    """A pruner, and what it made of a model: its supernet, of exact accumulation along the first level of every
    unit.
    """

    model: PreTrainedModel
    pruner: Pruner
    supernet: Supernet

    @property
    def space(self) -> Space:
        return self.supernet.space

    @property
    def names(self) -> list[str]:
        return [unit.name for unit in self.space.units]

    def survey(self, ids: Tensor = IDS) -> Mapping[str, Tensor]:
        return self.pruner.survey(self.model, Calibration(ids, 2), torch.device("cpu"), untracked)

    def weights(self, place: Place, allocation: Sequence[int]) -> dict[str, Tensor] | None:
        return place.weights(
            [self.supernet.candidate(unit, allocation[unit]) if allocation[unit] else None for unit, _ in place.units]
        )


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    return items


def first_level(unit: Unit, index: int) -> list[float]:
    return [float(level == 1) for level in range(len(unit.levels))]


def even(unit: Unit, index: int) -> list[float]:
    return [1 / len(unit.levels)] * len(unit.levels)


@pytest.fixture(scope="module", params=CASES, ids=[", ".join(case) for case in CASES])
def case(
    request: pytest.FixtureRequest,
    model_of: Callable[..., PreTrainedModel],
    built: Callable[..., Supernet],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    family, name = request.param
    model, pruner = model_of(family, num_hidden_layers=2), PRUNERS[name]
    return Case(model, pruner, built(model, tmp_path_factory.mktemp("supernets"), pruner, IDS, weights=first_level))


def test_every_level_keeps_what_was_asked_for(case: Case) -> None:
    assert case.supernet.complete
    for index, unit in enumerate(case.space.units):
        assert [count(case.supernet.candidate(index, level)) for level in range(1, len(unit.levels))] == [
            level.kept for level in unit.levels[1:]
        ]


@torch.no_grad()
def test_weights_are_finite_and_zero_where_they_are_removed(case: Case) -> None:
    for place in places(case.model, case.space):
        for index, layer in place.units:
            for level in range(1, len(case.space.units[index].levels)):
                candidate = case.supernet.candidate(index, level)
                dense = place.part.weight(layer or place.part.column)
                weight = full_weight(place.part, layer or place.part.column, candidate)
                assert weight.shape == dense.shape and weight.dtype == dense.dtype and bool(weight.isfinite().all())
                if isinstance(candidate, Weights):
                    assert not bool(weight[~candidate.mask].any())
                if isinstance(candidate, Members):
                    assert candidate.kept.tolist() == sorted(set(candidate.kept.tolist()))
                    assert candidate.bias is None or bool(candidate.bias.isfinite().all())


def test_units_come_in_the_order_of_the_forward_pass(case: Case) -> None:
    found = dict.fromkeys(index for place in places(case.model, case.space) for index, _ in place.units)
    assert list(found) == list(range(len(case.space.units)))
    assert case.names == [one.name for one in case.pruner.prunables(sub_blocks(case.model))]


@torch.no_grad()
def logits(case: Case, allocation: Sequence[int]) -> Tensor:
    """Run from the supernet as the search does, sub-block by sub-block."""
    hidden, contexts = entry(case.model, IDS)
    for place in places(case.model, case.space):
        weights = case.weights(place, allocation)
        hidden = hidden if weights is None else place.part(hidden, contexts[place.part.block], weights)
    normed, head = final_norm_and_head(case.model, hidden)
    return head.linear(normed)


@torch.no_grad()
def test_the_dense_level_is_the_dense_model_bit_for_bit(case: Case) -> None:
    dense = [0] * len(case.space.units)
    expected = case.model(IDS).logits
    assert all(case.weights(place, dense) == {} for place in places(case.model, case.space))
    assert torch.equal(logits(case, dense), expected)
    assert torch.equal(assemble(case.model, case.supernet, dense)(IDS).logits, expected)


def test_every_unit_at_its_first_level_changes_what_the_model_says(case: Case) -> None:
    expected = logits(case, [0] * len(case.space.units))
    for index in range(len(case.space.units)):
        changed = logits(case, [int(unit == index) for unit in range(len(case.space.units))])
        assert bool(changed.isfinite().all()) and not torch.equal(changed, expected)


def test_the_survey_speaks_of_units(case: Case) -> None:
    survey = case.survey()
    shapes: dict[str, Sequence[int]] = {}
    for place in places(case.model, case.space):
        for index, layer in place.units:
            shapes[case.names[index]] = place.part.weight(layer).shape if layer else (case.space.units[index].total,)
    assert not survey or survey.keys() == shapes.keys()
    for name, scores in survey.items():
        assert tuple(scores.shape) == tuple(shapes[name]) and bool(scores.isfinite().all())


def test_the_survey_costs_tokens_if_it_reads_the_text(case: Case) -> None:
    survey, other = case.survey(), case.survey(OTHER_IDS)
    reads = any(not torch.equal(scores, other[name]) for name, scores in survey.items())
    tokens = case.pruner.survey_tokens(Calibration(IDS, 2))
    assert (tokens > 0) == reads
    assert not reads or tokens >= IDS.numel()


@torch.no_grad()
def test_the_manifest_records_seconds_and_the_errors_of_fits(case: Case) -> None:
    """Errors as they are measured on the data, on the inputs that the model pruned so far gives, in float64."""
    hidden, contexts = entry(case.model, IDS)
    for place in places(case.model, case.space):
        part, context = place.part, contexts[place.part.block]
        weights = case.weights(place, [1] * len(case.space.units))
        for index, layer in place.units:
            record = case.supernet.manifest["units"][case.names[index]]
            dense = part.weight(layer or part.column)
            assert record["seconds"] >= 0.0
            fits = isinstance(case.pruner.statistics(dense, 1), LeastSquares)
            assert ("errors" in record) == fits
            if fits:
                X = part.inputs(layer or part.column, hidden, context, weights if layer else None).double()
                assert record["errors"] == pytest.approx(
                    measured(case, place, index, X, dense.double()), rel=1e-2, abs=1e-5
                )
        hidden = hidden if weights is None else part(hidden, context, weights)


def measured(case: Case, place: Place, unit: int, X: Tensor, dense: Tensor) -> list[float]:
    """||X W_k - X W||^2 / ||X W||^2 of each level but the dense one."""
    errors, T = [], X @ dense.T
    for level in range(1, len(case.space.units[unit].levels)):
        candidate = case.supernet.candidate(unit, level)
        columns = (
            member_columns(candidate.kept, place.part.groups.width) if isinstance(candidate, Members) else slice(None)
        )
        output = X[:, columns] @ candidate.weight.double().T
        errors.append(float((output - T).square().sum() / T.square().sum()))
    return errors


@pytest.mark.sampled
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
@torch.no_grad()
def test_families_that_differ(
    model_of: Callable[..., PreTrainedModel], built: Callable[..., Supernet], tmp_path: Path, family: str, name: str
) -> None:
    """Weights that are stored transposed, fused layers, and norms behind the sub-blocks: all that a method can make is
    sound.
    """
    model, pruner = model_of(family), PRUNERS[name]
    case = Case(model, pruner, built(model, tmp_path, pruner, IDS, weights=first_level))
    test_every_level_keeps_what_was_asked_for(case)
    test_weights_are_finite_and_zero_where_they_are_removed(case)
    test_the_survey_speaks_of_units(case)
    dense = assemble(model, case.supernet, [0] * len(case.names))(IDS).logits
    for level in (1, -1):
        pruned = assemble(model, case.supernet, [range(len(unit.levels))[level] for unit in case.space.units])(
            IDS
        ).logits
        assert pruned.shape == dense.shape and bool(pruned.isfinite().all()) and not torch.equal(pruned, dense)


class InterruptionError(Exception):
    """As by a signal."""


def unit_files(supernet: Supernet) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (supernet.path / "units").iterdir()}


# One of each way to look at the text: what a build must have again when it goes on.
GOING_ON = ("obs", "flap", "amp", "taylor", "bonsai", "wanda", "sparsegpt 2:4", "gptq", "depth")
INTERRUPTED = [
    pytest.param(case, id=", ".join(case), marks=[] if case in product(["llama"], GOING_ON) else [pytest.mark.slow])
    for case in CASES
]


@pytest.mark.parametrize("weights", [first_level, pytest.param(even, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", INTERRUPTED, indirect=True)
def test_builds_are_alike_even_if_interrupted(
    case: Case,
    tmp_path: Path,
    built: Callable[..., Supernet],
    monkeypatch: pytest.MonkeyPatch,
    weights: Callable[..., Any],
) -> None:
    """In the middle of the second block, between layers that share their inputs where the method prunes those."""
    expected = case.supernet
    if weights is even:
        expected = built(case.model, tmp_path / "undisturbed", case.pruner, IDS, weights=even)
    units = len(case.space.units)
    write, left = Supernet.write, [min(units // 2 + 1, units - 1)]

    def interrupting(supernet: Supernet, *arguments: Any) -> None:
        if not left[0]:
            raise InterruptionError
        left[0] -= 1
        write(supernet, *arguments)

    with monkeypatch.context() as patch, pytest.raises(InterruptionError):
        patch.setattr(Supernet, "write", interrupting)
        built(case.model, tmp_path / "interrupted", case.pruner, IDS, weights=weights)
    again = built(case.model, tmp_path / "interrupted", case.pruner, IDS, weights=weights)
    assert unit_files(again) == unit_files(expected)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", PRUNERS)
def test_halves_of_the_text_merge_to_the_whole(name: str, width: int) -> None:
    """So that processes that each see a part of it can add up what they found."""
    generator = torch.Generator().manual_seed(0)
    dense, X = (torch.randint(-4, 5, (rows, 12), generator=generator).float() for rows in (5, 10))  # sums are exact
    whole, first, second = (PRUNERS[name].statistics(dense, width) for _ in range(3))
    if whole is None or first is None or second is None:
        assert whole is first is second is None
        return
    whole.add(X)
    first.add(X[:4])
    second.add(X[4:])
    first.merge(second)
    assert vars(whole).keys() == vars(first).keys()
    for key, value in vars(whole).items():
        found = vars(first)[key]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, key


def test_merged_problems_have_the_targets_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    X, T = (torch.randint(-4, 5, (10, columns), generator=generator).float() for columns in (6, 3))
    whole, first, second = (LeastSquares.zeros(6, 3) for _ in range(3))
    whole.add(X, T)
    first.add(X[:4], T[:4])
    second.add(X[4:], T[4:])
    first.merge(second)
    assert torch.equal(first.moment, whole.moment) and first.energy == whole.energy
