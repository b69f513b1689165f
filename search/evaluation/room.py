"""Decides how many hidden states exist at a time, and goes on with half as many when they turn out to be too many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from supernet.system.memory import is_out_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Room:
    """Room for hidden states. It halves whenever memory falls short, and stays as small as that."""

    def __init__(self, limit: int, state_bytes: int, release: Callable[[], None]) -> None:
        """Begin with all the room that is given.

        Args:
            limit: How many bytes of hidden states may exist at a time.
            state_bytes: What one sequence takes: its residual stream before and behind the sub-block at work.
            release: Is called when memory fell short, and lets go of what can be made again.
        """
        self.limit, self.state_bytes = limit, state_bytes
        self._release = release

    @property
    def states(self) -> int:
        """The number of hidden states that may exist at a time, at least 1."""
        return max(1, self.limit // self.state_bytes)

    def tried(self, states: int, work: Callable[[], Result]) -> Result | None:
        """Do some work, which holds this many states at a time, and return its result.

        None says that memory fell short and that there is room for half as many states now. With a single state the
        error is raised.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if states == 1 or not is_out_of_memory(error):
                raise
        # Only behind the handler are the tensors of the failed work gone: the error holds them.
        self.limit = min(self.limit, states * self.state_bytes) // 2
        self._release()
        log.warning("out of memory with %d hidden states at a time; going on with half of them", states)
        return None
