"""How many hidden states exist at a time, and what happens when they turn out to be too many."""

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
        """Begin with all of it.

        Args:
            limit: Bytes of hidden states.
            state_bytes: Of the residual stream of one sequence, before and behind the sub-block at work.
            release: Lets go of what can be made again; called when memory fell short.
        """
        self.limit, self.state_bytes = limit, state_bytes
        self._release = release

    @property
    def states(self) -> int:
        """How many hidden states may exist at a time."""
        return max(1, self.limit // self.state_bytes)

    def tried(self, states: int, work: Callable[[], Result]) -> Result | None:
        """Return the result of work on so many states at a time.

        None says that memory fell short, and that there is room for half as many now; with a single state the error is
        passed on.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if states == 1 or not is_out_of_memory(error):
                raise
        # Out here the tensors of the failed work are gone.
        self.limit = min(self.limit, states * self.state_bytes) // 2
        self._release()
        log.warning("out of memory with %d hidden states at a time; going on with half of them", states)
        return None
