"""Keeps candidates in memory: those that were used last stay, and the next ones are read in the background."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields

from torch import Tensor

from supernet.candidates import Candidate

Key = tuple[int, int]  # the index of a unit in the space, and a level


class CandidateCache:
    """Keeps candidates up to a number of bytes; those that have not been used for the longest time go first."""

    def __init__(self, read: Callable[[int, int], Candidate], limit: int) -> None:
        """Start empty.

        Args:
            read: Gives the candidate of a unit (index in the space) and a level. It is called from the thread that asks
                and from one in the background.
            limit: The most bytes to keep. A candidate that was asked for in advance is kept besides until it is used.
        """
        self.limit, self.bytes = limit, 0
        self._read = read
        self._kept: OrderedDict[Key, Candidate] = OrderedDict()
        self._coming: dict[Key, Future[Candidate]] = {}
        self._reader = ThreadPoolExecutor(1, "candidates")

    def get(self, unit: int, level: int) -> Candidate:
        """Return the candidate of a unit at a level; whatever `read` raised is raised here."""
        key = unit, level
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        coming = self._coming.pop(key, None)
        candidate = self._read(unit, level) if coming is None else coming.result()
        self._keep(key, candidate)
        return candidate

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Begin to read, in the background, those of these candidates that are not in memory yet."""
        for key in keys:
            if key not in self._kept and key not in self._coming:
                self._coming[key] = self._reader.submit(self._read, *key)

    def clear(self) -> None:
        """Let go of everything. It can be called after an error, too."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()
        self._kept.clear()
        self.bytes = 0

    def close(self) -> None:
        """Let go of everything, and end the thread in the background."""
        self.clear()
        self._reader.shutdown()

    def _keep(self, key: Key, candidate: Candidate) -> None:
        size = candidate_bytes(candidate)
        if size > self.limit:
            return
        self._kept[key] = candidate
        self.bytes += size
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= candidate_bytes(oldest)


def candidate_bytes(candidate: Candidate) -> int:
    """Return how many bytes a candidate's tensors take."""
    values = [getattr(candidate, field.name) for field in fields(candidate)]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
