"""Work side by side comes back in order, and each thread's sub-block can have other parameters."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.workers import MOST, Workers
from supernet.architecture import entry, sub_blocks


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("count", "workers", "each"), [(1, 1, 1), (2, 2, 1), (MOST, MOST, 1), (2 * MOST, MOST, 2), (MOST + 1, MOST, (1, 2))]
)
def test_workers_share_the_threads(threads: Callable[[int], None], count: int, workers: int, each: int | tuple[int, int]) -> None:
    threads(count)
    made = Workers(torch.device("cpu"))
    assert made.count == workers
    here = threading.current_thread()
    together = threading.Barrier(workers)

    def asked(_: int) -> tuple[int, bool]:
        together.wait()  # so that each thread answers
        return torch.get_num_threads(), threading.current_thread() is here

    found = made.map(asked, range(workers))
    expected = {each} if isinstance(each, int) else set(each)
    assert set(found) == {(threads_of, workers == 1) for threads_of in expected}
    assert sum(number for number, _ in found) == count
    made.close()
    assert torch.get_num_threads() == count


def test_results_come_in_order_and_without_gradients(threads: Callable[[int], None]) -> None:
    threads(2)
    weight = torch.ones(3, requires_grad=True)
    found = Workers(torch.device("cpu")).map(lambda factor: factor * weight.sum(), range(50))
    assert [float(one) for one in found] == [3.0 * factor for factor in range(50)]
    assert not any(one.requires_grad for one in found)


def test_a_single_piece_gets_all_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    assert Workers(torch.device("cpu")).map(lambda _: torch.get_num_threads(), [0]) == [2]


def test_a_single_piece_can_be_kept_to_one_worker(threads: Callable[[int], None]) -> None:
    threads(2)
    assert Workers(torch.device("cpu")).map(lambda _: torch.get_num_threads(), [0], all_threads=False) == [1]


def test_when_an_error_comes_through_no_thread_is_at_work(threads: Callable[[int], None]) -> None:
    threads(2)
    ended: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            raise MemoryError
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(MemoryError):
        Workers(torch.device("cpu")).map(work, [0, 1, 2, 3, 4, 5])
    before = len(ended)
    time.sleep(0.5)
    assert len(ended) == before < 5


def test_an_error_comes_through(threads: Callable[[int], None]) -> None:
    threads(2)
    with pytest.raises(ZeroDivisionError):
        Workers(torch.device("cpu")).map(lambda number: 1 // number, [1, 0, 1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mamba"])
def test_threads_run_a_sub_block_with_parameters_of_their_own(
    threads: Callable[[int], None], family: str, model_of: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    threads(2)
    model, workers = model_of(family), Workers(torch.device("cpu"))
    hidden, contexts = entry(model, ids[:1])
    for part in sub_blocks(model):
        layer = part.column
        others = [part.replaced(layer, factor * part.weight(layer)) for factor in range(1, 9)]
        expected = [part(hidden, contexts[part.block], weights) for weights in others]
        found = workers.map(
            lambda work: workers.own(work[0])(work[1], contexts[work[0].block], work[2]),
            [(part, hidden, weights) for weights in others * 4],
        )
        for number, state in enumerate(found):
            torch.testing.assert_close(state, expected[number % 8])
        hidden = part(hidden, contexts[part.block])


def test_a_threads_sub_block_shares_the_models_parameters(
    threads: Callable[[int], None], model_of: Callable[..., PreTrainedModel]
) -> None:
    threads(2)
    workers, part = Workers(torch.device("cpu")), sub_blocks(model_of("llama"))[0]
    twins = workers.map(lambda _: workers.own(part), range(20))
    assert workers.own(part) is part
    assert len({id(twin.module) for twin in twins}) <= 2
    for twin in twins:
        assert twin.module is not part.module
        assert [id(p) for p in twin.module.parameters()] == [id(p) for p in part.module.parameters()]
