"""Where things lie while allocations are measured, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from search.evaluation.teacher import TeacherTargets
from supernet.errors import InputError
from supernet.system.memory import available

RESIDENT = ("model", "blocks")
STATES, CANDIDATES = 0.4, 0.25  # shares of the free memory of the device
TARGETS = 0.1  # share of the free main memory
# And no more than that of main memory, which others use, too (docs/evaluator.md has what more would gain).
MOST_STATES, MOST_CANDIDATES, MOST_TARGETS = 1 << 30, 1 << 29, 1 << 29


@dataclass(frozen=True)
class Resources:
    """Where things lie while a generation is measured, and how much room they take.

    Attributes:
        device: Where the work is done.
        resident: `model`: the dense model is on the device; `blocks`: only the block at work is, and the other weights
            stay where they are, in main memory or mapped from the checkpoint.
        memory: Bytes of hidden states at a time, and as many of the dense model's targets, which lie in main memory
            (what exceeds that, in files); None for shares of what is free, with a most for those in main memory.
        cache: Bytes of candidates kept from sweep to sweep; None for such a share of what is free, or for none with
            `blocks`.
        scratch: Folder of the files that do not outlive the process; None for the system's.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resident: str = "model"
    memory: int | None = None
    cache: int | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if self.resident not in RESIDENT:
            raise InputError(f"evaluator.resident={self.resident} is not known; choose one of {', '.join(RESIDENT)}")

    @property
    def lends_blocks(self) -> bool:
        """Whether only the block at work is on the device."""
        return self.resident == "blocks"

    def state_bytes(self) -> int:
        """Return how many bytes of hidden states may exist at a time."""
        return self._share(STATES, MOST_STATES) if self.memory is None else self.memory

    def candidate_bytes(self) -> int:
        """Return how many bytes of candidates are kept from sweep to sweep."""
        if self.cache is not None:
            return self.cache
        return 0 if self.lends_blocks else self._share(CANDIDATES, MOST_CANDIDATES)

    def target_bytes(self) -> int:
        """Return how many bytes of the dense model's targets are kept in main memory."""
        return min(MOST_TARGETS, int(available() * TARGETS)) if self.memory is None else self.memory

    def total_bytes(self) -> int:
        """Return the most that all of these take together, of the device's memory and of main memory."""
        return self.state_bytes() + self.candidate_bytes() + self.target_bytes()

    def _share(self, share: float, most: int) -> int:
        """A share of what is free on the device; no more than `most` where that is main memory."""
        size = int(available(self.device) * share)
        return min(most, size) if self.device.type == "cpu" else size

    def teacher_targets(self) -> TeacherTargets:
        """Return an empty store for the dense model's side of sequences."""
        return TeacherTargets(self.target_bytes(), self.scratch)
