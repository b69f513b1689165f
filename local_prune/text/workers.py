"""Independent pieces of work side by side on a CPU.

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

SIDE_BY_SIDE = 2  # pieces of work, each on all threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that work side by side; none where there is one core, or on other devices, which do so themselves."""

    def __init__(self, device: torch.device) -> None:
        """Start them if the device has use for them."""
        self.count = SIDE_BY_SIDE if device.type == "cpu" and torch.get_num_threads() > 1 else 1
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(self.count, "worker") if self.count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` of every item, in their order and without gradients. When it ends, with an error too, no thread is at
        work.
        """
        return list(self.stream(work, items, len(items)))

    def stream(
        self, work: Callable[[Item], Result], items: Sequence[Item], ahead: int | None = None
    ) -> Generator[Result, None, None]:
        """`work` of every item, in their order and without gradients, a few of them ahead of whoever takes the results.

        When it ends, with an error too or because nobody asks for more, no thread is at work.

        Args:
            work: Called from several threads.
            items: What it is called with.
            ahead: How many results may be under way or wait at a time; as many as there are threads if not said.
        """
        if self._pool is None or len(items) < 2:
            yield from map(work, items)
            return

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():  # every thread has its own mode
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
        """The sub-block for the thread that asks: its module can run with other parameters than those of other threads'
        modules.

        All share the model's parameters themselves.
        """
        if self._pool is None or threading.current_thread() is threading.main_thread():
            return part
        known: dict[str, SubBlock] = self._own.__dict__.setdefault("parts", {})
        if part.name not in known:
            known[part.name] = replace(part, module=_twin(part.module))
        return known[part.name]


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its tensors and configuration."""
    shared = [
        *module.parameters(),
        *module.buffers(),
        *(one.config for one in module.modules() if hasattr(one, "config")),
    ]
    return copy.deepcopy(module, {id(value): value for value in shared})
