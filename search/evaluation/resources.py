"""Settings and defaults of where things lie while allocations are measured, and how much memory they may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from search.evaluation.teacher import TeacherTargets
from supernet.errors import InputError
from supernet.system.memory import available

RESIDENT = ("model", "blocks")
STATES, CANDIDATES = 0.4, 0.25  # shares of the device's free memory
TARGETS = 0.1  # the share of the free main memory
# Main memory is used by other programs, too, so of that no more than these bytes are taken. The limit of candidates was
# chosen by the measurement in docs/evaluator.md.
MOST_STATES, MOST_CANDIDATES, MOST_TARGETS = 1 << 30, 1 << 29, 1 << 29


@dataclass(frozen=True)
class Resources:
    """Where things lie while a generation is measured, and how much memory they may take.

    Attributes:
        device: Where the work is done.
        resident: With `model` the whole dense model is on the device; with `blocks` only the block at work is, and the
            other weights stay where they are, in main memory or mapped from the checkpoint.
        memory: How many bytes of hidden states may exist at a time, and how many bytes of the dense model's targets
            are kept in main memory (more of them go to files). None takes shares of the memory that is free, with an
            upper limit for what lies in main memory.
        cache: How many bytes of candidates are kept from sweep to sweep. None takes such a share, too, or keeps none
            with `blocks`.
        scratch: The folder of files that vanish with the process; None for the system's folder of temporary files.
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
        """Return a share of the device's free memory, and no more than `most` bytes where that is main memory."""
        size = int(available(self.device) * share)
        return min(most, size) if self.device.type == "cpu" else size

    def teacher_targets(self, stores: int = 1) -> TeacherTargets:
        """Return an empty store for the dense model's side of sequences: one of `stores` that share the limit."""
        return TeacherTargets(self.target_bytes() // stores, self.scratch)
