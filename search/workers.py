"""Independent pieces of work side by side on a CPU, each on its share of the threads.

An operation on a few megabytes that is split over all threads waits for them to wake and to meet again: one after the other,
attentions over 512 tokens take 1.7 times as long as in two threads that each have an attention of their own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeVar

import torch

from supernet.architecture import SubBlock

MOST = 8  # workers; more cores give each of them more threads, so that a few pieces of work still keep all busy

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that work side by side; none on other devices, which do so themselves."""

    def __init__(self, device: torch.device) -> None:
        """Start as many as the device has use for."""
        threads = torch.get_num_threads()
        self.count = min(threads, MOST) if device.type == "cpu" else 1
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "evaluator")
            self._start(self._pool, threads)

    def _start(self, pool: ThreadPoolExecutor, threads: int) -> None:
        started = threading.Barrier(self.count)
        shares = [threads // self.count + (number < threads % self.count) for number in range(self.count)]
        try:
            for future in [pool.submit(_begin, share, started) for share in shares]:
                future.result()
        except BaseException:
            started.abort()  # those that wait for one that could not be started
            raise
        torch.set_num_threads(threads)  # for threads to come; those that are there keep what they have

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], all_threads: bool = True) -> list[Result]:
        """`work` of every item, in their order and without gradients. When it ends, with an error too, no thread is at work.

        Args:
            work: What to do.
            items: With what.
            all_threads: Whether a single one gets all threads. Its last bits may depend on their number.
        """
        if self._pool is None or (all_threads and len(items) < 2):
            return [work(item) for item in items]

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():  # every thread has its own mode
                return work(item)

        futures = [self._pool.submit(without_gradients, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def own(self, part: SubBlock) -> SubBlock:
        """The sub-block for the thread that asks: its module can run with other parameters than those of other threads' modules.

        All share the model's parameters themselves.
        """
        if self._pool is None or threading.current_thread() is threading.main_thread():
            return part
        known: dict[str, SubBlock] = self._own.__dict__.setdefault("parts", {})
        if part.name not in known:
            known[part.name] = replace(part, module=_twin(part.module))
        return known[part.name]


def _begin(threads: int, started: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread takes over the process's number once, when it first asks
    torch.set_num_threads(threads)
    started.wait()  # so that each of the pool's threads is started, and gets here


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its tensors and configuration."""
    shared = [*module.parameters(), *module.buffers(), *(one.config for one in module.modules() if hasattr(one, "config"))]
    return copy.deepcopy(module, {id(value): value for value in shared})
