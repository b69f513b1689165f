"""What one gradient, walked backwards sub-block by sub-block, says of every level is what the whole model's says, in
float64.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import search.evaluation.backward
from search.evaluation.fitness import CrossEntropy, Fitness, KlDivergence, TopKDivergence
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.gradient import PartGradient, part_gradient
from search.evaluation.resources import Resources
from supernet.candidates import Candidate, Members
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.space import Allocation, Space
from supernet.store import Supernet
from tests.conftest import CONFIGS, MIXER_CONFIGS
from tests.search.evaluation.whole_model import (
    CHOSEN,
    KINDS,
    MEMBERS,
    Draw,
    Handmade,
    ModelOf,
    close,
    whole,
)

SupernetMaker = Callable[[PreTrainedModel], Supernet]
MIXED = (1, 3, 1, 0, 3, 1)  # of a random supernet: some levels dense, some absent
FITNESSES: list[Fitness] = [
    *(fitness(hidden_weight=weight) for fitness in (KlDivergence, CrossEntropy) for weight in (0.0, 0.5)),
    TopKDivergence(k=7),
    TopKDivergence(k=7, hidden_weight=0.5),
]


@pytest.fixture
def llama(model_of: ModelOf) -> PreTrainedModel:
    """A small random model of the test's own."""
    return model_of("llama")


def cases_of(names: Iterable[str], kinds: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs but members of mixers, which have none."""
    return [(name, kind) for name, kind in product(names, kinds) if name in CONFIGS or kind not in MEMBERS]


# Gemma 2 has norms behind its sub-blocks and caps its logits, GPT-2 keeps its weights transposed.
CASES = cases_of(("llama_with_biases", "gemma2", "gpt2", "mamba"), KINDS)
CASES += cases_of(CONFIGS | MIXER_CONFIGS, ("members with biases", "weights", "sub-blocks"))


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "kind"), dict.fromkeys(CASES))
def test_changes_are_those_of_the_whole_model(
    name: str, kind: str, model_of: ModelOf, ids: Tensor, random_allocations: Draw
) -> None:
    model = model_of(name)
    supernet: Any = Handmade(model, kind)
    units = supernet.space.units
    dense, sparsest = (0,) * len(units), tuple(len(unit.levels) - 1 for unit in units)
    (drawn,) = random_allocations(supernet.space, 1, seed=3)
    fitness: Fitness = KlDivergence()
    for allocation in ((*sparsest[:2], *drawn[2:]), sparsest, dense):
        if allocation == dense:
            fitness = CrossEntropy()  # the divergence does not change there to first order
        found = GenerationEvaluator(model, supernet, ids, fitness).effects(allocation, CHOSEN)
        assert [one.dtype for one in found] == [np.dtype(np.float64)] * len(units)
        assert [len(one) for one in found] == [len(unit.levels) for unit in units]
        assert all(one[level] == 0 for one, level in zip(found, allocation, strict=True))
        close(found, whole(model, supernet, fitness, ids).effects(allocation))


@pytest.mark.sampled
@pytest.mark.parametrize("fitness", FITNESSES, ids=lambda fitness: f"{type(fitness).__name__}-{fitness.hidden_weight}")
def test_changes_are_those_of_every_fitness(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, fitness: Fitness
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, fitness)
    for allocation in (MIXED, (1, 2, 0, 1, 2, 1)):
        close(
            evaluate.effects(allocation, CHOSEN), whole(family_model, family_supernet, fitness, ids).effects(allocation)
        )


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_the_whole_model_are_its_differences(
    kind: str, model_of: ModelOf, ids: Tensor, random_allocations: Draw
) -> None:
    """What the other tests compare with, itself: GPT-2 computes all in float64, where others have norms in float32."""
    model = model_of("gpt2")
    supernet: Any = Handmade(model, kind)
    (allocation,) = random_allocations(supernet.space, 1, seed=3)
    exact = whole(model, supernet, KlDivergence(hidden_weight=0.5), ids)
    expected = exact.effects(allocation)
    for unit in range(0, len(expected), 3):
        for level in range(len(expected[unit])):
            ends = []
            for length in (-1e-5, 1e-5):
                steps = exact.no_steps()
                steps[unit][level] = length
                ends.append(float(exact.loss(allocation, steps)))
            assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(expected[unit][level], rel=1e-6, abs=1e-8)


class Near:
    """Every member stays, of weights near to the dense ones: to a level's first order nothing else counts."""

    def __init__(self, model: PreTrainedModel, space: Space, distance: float) -> None:
        self.model, self.space, self.distance = model, space, distance

    def candidate(self, unit: int, level: int, device: Any = "cpu") -> Candidate:
        part = sub_blocks(self.model)[unit]
        dense = part.weight(part.column)
        noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(10 * unit + level))
        assert part.groups is not None
        return Members(torch.arange(part.groups.members), dense + self.distance * noise.to(dense))


@pytest.mark.sampled
def test_the_fitness_changes_as_told_where_levels_are_near(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor
) -> None:
    supernet: Any = Near(family_model, family_supernet.space, 3e-4)
    evaluate = GenerationEvaluator(family_model, supernet, ids, CrossEntropy())
    found = evaluate.effects(MIXED, CHOSEN)
    moved = [(*MIXED[:unit], level, *MIXED[unit + 1 :]) for unit in range(len(MIXED)) for level in range(4)]
    expected = evaluate(moved, CHOSEN).mean(1) - evaluate([MIXED], CHOSEN).mean(1)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=0.03 * np.abs(expected).max())


def test_the_change_of_a_mean_is_the_mean_of_changes(
    llama: PreTrainedModel, random_supernet: SupernetMaker, ids: Tensor
) -> None:
    evaluate = GenerationEvaluator(llama, random_supernet(llama), ids, KlDivergence())
    both, *each = (evaluate.effects(MIXED, np.array(rows)) for rows in ([0, 1], [0], [1]))
    close(both, [(a + b) / 2 for a, b in zip(*each, strict=True)], 1e-5)
    assert max(float(np.abs(a - b).max()) for a, b in zip(*each, strict=True)) > 1e-2


def test_first_positions_can_be_left_out(llama: PreTrainedModel, random_supernet: SupernetMaker, ids: Tensor) -> None:
    """The gradient is that of the loss on the other positions."""
    supernet: Any = Near(llama, random_supernet(llama).space, 3e-4)
    for fitness in (CrossEntropy(), KlDivergence()):
        evaluate = GenerationEvaluator(llama, supernet, ids, fitness, unscored=3)
        found = np.concatenate(evaluate.effects(MIXED, CHOSEN))
        assert not np.allclose(
            found, np.concatenate(GenerationEvaluator(llama, supernet, ids, fitness).effects(MIXED, CHOSEN))
        )
    evaluate.use(CrossEntropy())
    found = np.concatenate(evaluate.effects(MIXED, CHOSEN))
    moved = [(*MIXED[:unit], level, *MIXED[unit + 1 :]) for unit in range(len(MIXED)) for level in range(4)]
    expected = evaluate(moved, CHOSEN).mean(1) - evaluate([MIXED], CHOSEN).mean(1)
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("fitness", FITNESSES[::2], ids=lambda fitness: type(fitness).__name__)
def test_a_sequence_may_pass_the_head_in_pieces(
    llama: PreTrainedModel, random_supernet: SupernetMaker, ids: Tensor, fitness: Fitness
) -> None:
    supernet = random_supernet(llama)
    pieces = copy.copy(fitness)
    expected = GenerationEvaluator(llama, supernet, ids, fitness).effects(MIXED, CHOSEN)
    # of five tokens, and autograd's
    object.__setattr__(pieces, "chunk_bytes", 2 * 5 * 4 * int(llama.config.vocab_size))
    close(GenerationEvaluator(llama, supernet, ids, pieces).effects(MIXED, CHOSEN), expected, 1e-4)


@pytest.mark.parametrize("states", [1, 5, 20])
def test_any_memory_gives_the_same(
    llama: PreTrainedModel, random_supernet: SupernetMaker, ids: Tensor, states: int
) -> None:
    supernet = random_supernet(llama)
    expected = GenerationEvaluator(llama, supernet, ids, KlDivergence()).effects(MIXED, np.arange(5))
    memory = states * ids.shape[1] * int(llama.config.hidden_size) * llama.dtype.itemsize
    small = GenerationEvaluator(llama, supernet, ids, KlDivergence(), Resources(memory=memory, cache=0))
    close(small.effects(MIXED, np.arange(5)), expected, 1e-5)


def test_without_memory_half_as_many_sequences_move_together(
    llama: PreTrainedModel, random_supernet: SupernetMaker, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate = GenerationEvaluator(llama, random_supernet(llama), ids, KlDivergence())
    expected = evaluate.effects(MIXED, np.arange(5))
    final_states, tried = evaluate.forward.final_states, []

    def short(allocations: Sequence[Allocation], rows: Sequence[int], *others: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return final_states(allocations, rows, *others)

    evaluate.forward.final_states = short  # type: ignore[method-assign, assignment]
    close(evaluate.effects(MIXED, np.arange(5)), expected, 1e-5)
    assert tried == [5, 2, 2, 1]
    assert "going on with half" in caplog.text


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "kind"), cases_of(["gemma3", "gpt2", "mamba"], ["members with biases", "weights", "blocks"])
)
def test_blocks_lent_one_by_one_give_the_same_and_are_put_back(
    name: str, kind: str, model_of: ModelOf, ids: Tensor, random_allocations: Draw
) -> None:
    model = model_of(name)
    supernet: Any = Handmade(model, kind)
    (allocation,) = random_allocations(supernet.space, 1, seed=3)
    expected = GenerationEvaluator(model, supernet, ids, KlDivergence()).effects(allocation, CHOSEN)
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in model.state_dict().values()]
    streamed = GenerationEvaluator(model, supernet, ids, KlDivergence(), Resources(resident="blocks"))
    close(streamed.effects(allocation, CHOSEN), expected, 1e-5)
    assert streamed.forward.cache.bytes == 0
    for (pointer, value), tensor in zip(before, model.state_dict().values(), strict=True):
        assert tensor.data_ptr() == pointer and torch.equal(tensor, value)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "kind"), cases_of(["gemma2", "gpt2", "mamba2"], ["members with biases", "weights", "sub-blocks"])
)
def test_workers_side_by_side_give_the_same(
    name: str, kind: str, model_of: ModelOf, ids: Tensor, random_allocations: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    supernet: Any = Handmade(model, kind)
    (allocation,) = random_allocations(supernet.space, 1, seed=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    evaluate = GenerationEvaluator(model, supernet, ids, KlDivergence())
    assert evaluate.forward.workers.count == 2
    evaluate.forward.batch_tokens = ids.shape[1]  # a batch each
    found = evaluate.effects(allocation, CHOSEN)
    close(found, whole(model, supernet, KlDivergence(), ids).effects(allocation))
    np.testing.assert_array_equal(np.concatenate(evaluate.effects(allocation, CHOSEN)), np.concatenate(found))


@pytest.mark.sampled
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize(
    "fitness", [KlDivergence(), CrossEntropy(), TopKDivergence(k=7)], ids=lambda one: type(one).__name__
)
def test_the_model_is_left_as_it_was(
    name: str, trainable: bool, fitness: Fitness, model_of: ModelOf, random_supernet: SupernetMaker, ids: Tensor
) -> None:
    model = model_of(name)
    supernet = random_supernet(model)
    expected = GenerationEvaluator(model, supernet, ids, fitness).effects(MIXED, CHOSEN)
    model.requires_grad_(trainable)
    close(GenerationEvaluator(model, supernet, ids, fitness).effects(MIXED, CHOSEN), expected, 1e-6)
    for parameter in model.parameters():
        assert parameter.requires_grad == trainable and parameter.grad is None


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_finds_the_same_within_its_rounding(name: str, model_of: ModelOf, ids: Tensor) -> None:
    model = model_of(name).bfloat16()
    supernet: Any = Handmade(model, "members")
    found = GenerationEvaluator(model, supernet, ids, KlDivergence()).effects(MIXED, CHOSEN)
    close(found, whole(model, supernet, KlDivergence(), ids).effects(MIXED), 0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_given_as_it_is(llama: PreTrainedModel, ids: Tensor, value: float) -> None:
    supernet: Any = Handmade(llama, "members")
    supernet.candidates[3][0] = Members(torch.arange(2), torch.full((int(llama.config.hidden_size), 2), value))
    found = GenerationEvaluator(llama, supernet, ids, KlDivergence()).effects((1,) * 6, CHOSEN)
    assert not all(np.isfinite(one).all() for one in found)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["members with biases", "weights"])
def test_few_gradients_of_weights_exist_at_a_time(
    threads: int,
    kind: str,
    llama: PreTrainedModel,
    ids: Tensor,
    random_allocations: Draw,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of one sub-block: the sum of the batches so far, and one for each worker; no more for more sequences."""
    supernet: Any = Handmade(llama, kind)
    (allocation,) = random_allocations(supernet.space, 1, seed=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    evaluate = GenerationEvaluator(llama, supernet, ids, KlDivergence())
    evaluate.forward.batch_tokens = ids.shape[1]  # a batch each
    made: list[tuple[str, weakref.ref[Tensor]]] = []
    most = 0

    def watched(part: SubBlock, *others: Any) -> PartGradient:
        nonlocal most
        alive = [name for name, gradient in made if gradient() is not None]
        assert set(alive) <= {part.name}
        gradient = part_gradient(part, *others)
        made.extend((part.name, weakref.ref(weight)) for weight in gradient.weights.values())
        most = max(most, len(alive) // len(gradient.weights))
        return gradient

    monkeypatch.setattr(search.evaluation.backward, "part_gradient", watched)
    evaluate.effects(allocation, np.arange(5))
    assert made and most <= threads
