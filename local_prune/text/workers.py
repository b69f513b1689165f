"""Does independent pieces of work side by side on a CPU.

An operation on a few megabytes that is split over all threads waits for them to wake and to meet again; meanwhile
another piece of work can go on. The pieces keep torch's number of threads: `torch.set_num_threads` would break batched
LU in the whole process with torch 2.13 and MKL (`torch.linalg.solve` and `inv`). This project solves by Cholesky, which
stays right, but others in the process may not.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeVar

import torch

from supernet.models.architecture import SubBlock

SIDE_BY_SIDE = 2  # how many pieces of work are done at a time, each on all of torch's threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that work side by side. There are none where torch has one thread, and on devices other than CPUs.

    Attributes:
        count: How many pieces of work are done at a time.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the threads if the device has use for them."""
        self.count = SIDE_BY_SIDE if device.type == "cpu" and torch.get_num_threads() > 1 else 1
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(self.count, "worker") if self.count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the results of `work` for all items, in their order. Threads record nothing for gradients.

        When it ends, be it with an error, no thread is at work.
        """
        return list(self.stream(work, items, len(items)))

    def stream(
        self, work: Callable[[Item], Result], items: Sequence[Item], ahead: int | None = None
    ) -> Generator[Result, None, None]:
        """Yield the results of `work` for all items, in their order, a few of them computed in advance.

        Threads record nothing for gradients. When it ends, be it with an error or because nobody asks for more, no
        thread is at work.

        Args:
            work: The function, which is called from several threads.
            items: What it is called with.
            ahead: How many results may be under way or wait at a time; None for as many as there are threads.
        """
        if self._pool is None or len(items) < 2:
            yield from map(work, items)
            return

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():  # whether torch records for gradients is set for each thread
                return work(item)

        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) == (self.count if ahead is None else ahead):
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(without_gradients, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def own(self, part: SubBlock) -> SubBlock:
        """Return the sub-block for the thread that asks.

        Each thread gets a module of its own, as several threads may run it with different parameters at a time. All
        these modules share the model's own parameters.
        """
        if self._pool is None or threading.current_thread() is threading.main_thread():
            return part
        known: dict[str, SubBlock] = self._own.__dict__.setdefault("parts", {})
        if part.name not in known:
            known[part.name] = replace(part, module=_twin(part.module))
        return known[part.name]


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module that shares its tensors and configuration."""
    shared = [
        *module.parameters(),
        *module.buffers(),
        *(one.config for one in module.modules() if hasattr(one, "config")),
    ]
    return copy.deepcopy(module, {id(value): value for value in shared})
