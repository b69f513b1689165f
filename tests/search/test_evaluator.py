"""A generation in one sweep gives each allocation what it gets assembled and run alone."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluator import GenerationEvaluator
from supernet.architecture import SubBlock, sub_blocks
from supernet.assemble import assemble
from supernet.encoding import Candidate
from supernet.errors import InputError
from supernet.space import Allocation, Space, unit_of
from supernet.store import Supernet

Draw = Callable[..., Sequence[Allocation]]


@torch.no_grad()
def alone(model: PreTrainedModel, supernet: Supernet, allocation: Allocation, ids: Tensor) -> float:
    """The mean KL divergence a token, from whole logits in float64."""
    pruned = assemble(model, supernet, allocation)
    p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


class InFloat32:
    """A supernet's candidates in float32."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet

    def candidate(self, unit: int, level: int, device: torch.device) -> Candidate:
        candidate = self.supernet.candidate(unit, level, device)
        return Candidate(candidate.kept, candidate.weight.float())


@pytest.fixture
def generation(family_supernet: Supernet, random_allocations: Draw) -> list[Allocation]:
    """Allocations that share beginnings, some twice, with sub-blocks absent at either end and everywhere."""
    units = len(family_supernet.space.units)
    drawn = random_allocations(family_supernet.space, 4)
    related = [(*drawn[0][: units - 1], level) for level in range(4)]
    ends = [(3,) + (0,) * (units - 1), (0,) * (units - 1) + (3,), (3,) * units, (0,) * units]
    return [*drawn, *related, drawn[1], *ends, drawn[1]]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_a_generation_is_measured_as_each_alone(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation], batch: int
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, batch)
    chosen = np.array([3, 0, 4])
    found = evaluate(generation, chosen)
    expected = [alone(family_model, family_supernet, allocation, ids[chosen]) for allocation in generation]
    assert found.shape == (len(generation),)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found[-1] == found[1]
    assert abs(found[-2]) < 1e-6  # the dense allocation


def test_later_calls_meet_the_targets_of_earlier_ones(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, 2)
    for chosen in ([0, 1], [1, 2, 4], [4], [3, 2, 1, 0]):  # new, partly known, wholly known, in another order
        found = evaluate(generation[:2], np.array(chosen))
        fresh = GenerationEvaluator(family_model, family_supernet, ids, 2)(generation[:2], np.array(chosen))
        np.testing.assert_allclose(found, fresh, rtol=1e-4)


def test_the_pool_says_what_there_is_to_draw_from(family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, 2)
    assert (evaluate.sequences, evaluate.sequence_length) == tuple(ids.shape)


def test_shared_beginnings_are_run_once(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run = SubBlock.__call__

    def counted(part: SubBlock, *arguments: object) -> Tensor:
        calls.append(part.name)
        return run(part, *arguments)  # type: ignore[arg-type]

    evaluate = GenerationEvaluator(family_model, family_supernet, ids, 5)
    evaluate([(0,) * 6], np.arange(5))  # so that the targets are there
    monkeypatch.setattr(SubBlock, "__call__", counted)
    evaluate([(1, 1, 0, 0, 0, 1), (1, 1, 0, 0, 0, 2), (1, 1, 0, 2, 0, 2)], np.arange(5))
    names = [unit.name for unit in family_supernet.space.units]
    assert [calls.count(name) for name in names] == [1, 1, 1, 2, 2, 3]


def test_bfloat16_finds_the_same_within_its_rounding(
    family_model: PreTrainedModel,
    random_supernet: Callable[[PreTrainedModel], Supernet],
    ids: Tensor,
    generation: list[Allocation],
) -> None:
    model = copy.deepcopy(family_model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    supernet = random_supernet(model)
    found = GenerationEvaluator(model, supernet, ids, 2)(generation, np.arange(5))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    expected = GenerationEvaluator(model, InFloat32(supernet), ids, 2)(generation, np.arange(5))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.01)
    assert abs(found[-2]) < 1e-3  # the dense allocation


def test_a_fitness_that_is_not_finite_is_told(
    family_model: PreTrainedModel,
    ids: Tensor,
    random_supernet: Callable[[PreTrainedModel], Supernet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supernet = random_supernet(family_model)
    whole = supernet.candidate

    def overflown(unit: int, level: int, *arguments: object) -> Candidate:
        candidate = whole(unit, level)
        return Candidate(candidate.kept, candidate.weight * torch.inf)

    monkeypatch.setattr(supernet, "candidate", overflown)
    with pytest.raises(InputError, match="fitness of an allocation is not finite.*dtype=float32"):
        GenerationEvaluator(family_model, supernet, ids, 5)([(1,) * 6], np.arange(5))


def test_an_unfinished_supernet_is_told(family_model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    space = Space(tuple(unit_of(part, (part.members, 1)) for part in sub_blocks(family_model)))
    supernet = Supernet.open_or_create(tmp_path, space, {})
    with pytest.raises(InputError, match="its build is not finished"):
        GenerationEvaluator(family_model, supernet, ids, 5)([(1,) * 6], np.arange(5))
