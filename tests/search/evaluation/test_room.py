"""However much memory and how many threads there are, a generation is measured as with plenty of them."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluation.fitness import KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.resources import Resources
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.space import Allocation
from supernet.store import Supernet
from tests.search.evaluation.alone import Draw, ModelOf, alone, room_for


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers side by side, which the single thread that tests run with leaves no room for."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("states", [1, 2, 5, 7, 1000])
def test_each_sequence_has_its_own_loss_however_memory_splits_them(
    model_of: ModelOf,
    random_supernet: Callable[[PreTrainedModel], Supernet],
    ids: Tensor,
    states: int,
    random_allocations: Draw,
) -> None:
    model = model_of("llama")
    supernet = random_supernet(model)
    generation = random_allocations(supernet.space, 20)
    chosen = [4, 1, 3, 0]
    fitness = KlDivergence(chunk_bytes=1 << 20)  # of so many allocations, no more than 6 tokens at a time
    found = GenerationEvaluator(model, supernet, ids, fitness, room_for(states, model, ids))(
        generation, np.array(chosen)
    )
    expected = [
        [alone(model, supernet, allocation, ids[row : row + 1])[0] for row in chosen] for allocation in generation
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    for first, second in combinations(np.transpose(expected), 2):
        assert np.abs(first - second).mean() > 0.01  # so that none can stand for another


@pytest.mark.sampled(0)
@pytest.mark.usefixtures("two_threads")
def test_workers_side_by_side_find_the_same(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    assert evaluate.forward.workers.count == 2
    chosen = np.array([3, 0, 4])
    found = evaluate(generation, chosen)
    expected = [alone(family_model, family_supernet, allocation, ids[chosen]) for allocation in generation]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(evaluate(generation, chosen), found)


@pytest.mark.sampled
@pytest.mark.parametrize("cache", [None, 0, 3000])
def test_only_blocks_at_work_and_any_cache_find_the_same(
    family_model: PreTrainedModel,
    family_supernet: Supernet,
    ids: Tensor,
    generation: list[Allocation],
    cache: int | None,
) -> None:
    chosen = np.array([3, 0, 4])
    whole = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())(generation, chosen)
    pointers = [parameter.data_ptr() for parameter in family_model.parameters()]
    streamed = GenerationEvaluator(
        family_model, family_supernet, ids, KlDivergence(), Resources(resident="blocks", cache=cache)
    )
    for _ in range(2):
        np.testing.assert_array_equal(streamed(generation, chosen), whole)
    assert streamed.forward.cache.bytes <= (cache or 0)
    assert [parameter.data_ptr() for parameter in family_model.parameters()] == pointers  # lent ones came back


class Exhausted:
    """Fails for want of memory, as torch does, while more states than there is room for are at work."""

    def __init__(self, evaluate: GenerationEvaluator, room: int, error: Exception) -> None:
        self.room, self.error, self.failed = room, error, 0
        self.whole = evaluate.forward.final_states
        evaluate.forward.final_states = self  # type: ignore[method-assign, assignment]

    def __call__(self, allocations: Sequence[Allocation], rows: Sequence[int], *others: Any) -> Any:
        if len(allocations) * len(rows) > self.room:
            self.failed += 1
            raise self.error
        return self.whole(allocations, rows, *others)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
            "8 bytes"
        ),
        MemoryError(),
    ],
)
def test_without_memory_half_as_much_moves_together(
    family_model: PreTrainedModel,
    family_supernet: Supernet,
    ids: Tensor,
    generation: list[Allocation],
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = np.array([3, 0, 4])
    expected = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())(generation, chosen)
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    evaluate(generation[:1], chosen)  # so that the targets are there
    exhausted = Exhausted(evaluate, 5, error)
    np.testing.assert_allclose(evaluate(generation, chosen), expected, rtol=1e-5, atol=1e-7)
    assert exhausted.failed > 0
    assert "out of memory" in caplog.text and caplog.text.count("going on with half") == exhausted.failed
    failed = exhausted.failed
    evaluate(generation, chosen)
    assert exhausted.failed == failed  # it remembers


@pytest.mark.sampled(0)
def test_without_memory_for_all_targets_they_are_made_by_and_by(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    expected = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())(generation, np.arange(5))
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    exhausted = Exhausted(evaluate, 1, torch.OutOfMemoryError("CUDA out of memory"))
    np.testing.assert_allclose(evaluate(generation, np.arange(5)), expected, rtol=1e-5, atol=1e-7)
    assert exhausted.failed == 2  # five sequences, two, then one by one


@pytest.mark.sampled(0)
def test_where_one_state_is_too_much_the_error_is_passed_on(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    evaluate(generation[:1], np.arange(3))
    Exhausted(evaluate, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(generation, np.arange(3))


@pytest.mark.sampled(0)
def test_other_errors_are_passed_on(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    evaluate(generation[:1], np.arange(3))
    exhausted = Exhausted(evaluate, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        evaluate(generation, np.arange(3))
    assert exhausted.failed == 1


@pytest.mark.sampled(0)
def test_the_next_candidates_are_asked_for_while_a_sub_block_is_at_work(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence(), Resources(cache=0))
    evaluate.comparison.learn([0])
    events: list[str] = []
    prefetch, run = evaluate.forward.cache.prefetch, SubBlock.__call__

    def asked(keys: Sequence[tuple[int, int]]) -> None:
        events.append(f"ask {sorted(keys)}")
        prefetch(keys)

    def counted(part: SubBlock, *arguments: object) -> Tensor:
        events.append("run")
        return run(part, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate.forward.cache, "prefetch", asked)
    monkeypatch.setattr(SubBlock, "__call__", counted)
    evaluate([(1, 0, 2, 1, 0, 1)], np.array([0]))
    assert events == [
        "ask []",
        "run",
        "ask [(2, 2)]",
        "run",
        "ask [(3, 1)]",
        "run",
        "ask []",
        "run",
        "ask [(5, 1)]",
        "run",
        "run",
    ]


def test_an_unknown_residence_is_told() -> None:
    with pytest.raises(InputError, match="evaluator.resident=disk is not known; choose one of model, blocks"):
        Resources(resident="disk")
