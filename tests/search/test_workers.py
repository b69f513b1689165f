"""Work side by side comes back in order, and each thread's sub-block can have other parameters."""

import threading
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


@pytest.mark.parametrize(("count", "workers", "each"), [(1, 1, 1), (2, 2, 1), (MOST, MOST, 1), (2 * MOST, MOST, 2)])
def test_workers_share_the_threads(threads: Callable[[int], None], count: int, workers: int, each: int) -> None:
    threads(count)
    made = Workers(torch.device("cpu"))
    assert made.count == workers
    here = threading.current_thread()
    found = made.map(lambda _: (torch.get_num_threads(), threading.current_thread() is here), range(4 * MOST))
    assert set(found) == ({(each, False)} if workers > 1 else {(each, True)})
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
