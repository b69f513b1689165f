"""Work side by side comes back in order, and each thread's sub-block can have other parameters."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.text.workers import Workers
from supernet.models.architecture import sub_blocks
from supernet.models.forward import entry


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many threads torch has: to set that in earnest makes its batched LU wrong."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 2), (64, 2)])
def test_there_are_workers_where_there_are_cores(threads: Callable[[int], None], count: int, workers: int) -> None:
    threads(count)
    made = Workers(torch.device("cpu"))
    assert made.count == workers
    here = threading.current_thread()
    together = threading.Barrier(workers)

    def asked(_: int) -> bool:
        together.wait()  # so that each thread answers
        return threading.current_thread() is here

    assert made.map(asked, range(workers)) == [workers == 1] * workers
    made.close()


def test_solves_stay_right_beside_workers(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (
        torch.randn(3, 192, 192, generator=generator) + 20 * torch.eye(192),
        torch.randn(3, 192, 64, generator=generator),
    )
    before = torch.linalg.solve(A, B)
    threads(2)
    workers = Workers(torch.device("cpu"))
    workers.map(lambda _: torch.randn(300, 300) @ torch.randn(300, 300), range(8))
    torch.testing.assert_close(torch.linalg.solve(A, B), before)
    workers.close()


def test_results_come_in_order_and_without_gradients(threads: Callable[[int], None]) -> None:
    threads(2)
    weight = torch.ones(3, requires_grad=True)
    found = Workers(torch.device("cpu")).map(lambda factor: factor * weight.sum(), range(50))
    assert [float(one) for one in found] == [3.0 * factor for factor in range(50)]
    assert not any(one.requires_grad for one in found)


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


def test_a_stream_is_a_few_items_ahead_and_ends_with_whoever_takes_it(threads: Callable[[int], None]) -> None:
    threads(2)
    begun: list[int] = []
    stream = Workers(torch.device("cpu")).stream(lambda number: begun.append(number) or number, range(50))
    assert [next(stream), next(stream)] == [0, 1]
    time.sleep(0.2)
    assert len(begun) <= 4  # two were taken, two wait
    stream.close()
    before = len(begun)
    time.sleep(0.2)
    assert len(begun) == before


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
