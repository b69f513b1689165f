"""Depth: a sub-block or a block is present or dropped. Nothing is computed; which ones go is the search's business
(EvoPress).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.pruner import NoSurvey, Task
from supernet.candidates import Candidate, Dropped
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable, presence_prunables


@dataclass(frozen=True)
class DepthPruner(NoSurvey):
    """Attention and MLP of each block on their own, or blocks as a whole: `prune=depth`."""

    name: ClassVar[str] = "depth"
    version: ClassVar[int] = 1

    whole_blocks: bool = False

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """See `Pruner`."""
        return presence_prunables(parts, self.whole_blocks)

    def statistics(self, dense: Tensor, width: int) -> None:
        """See `Pruner`."""
        return None

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`."""
        return [Dropped() for _ in kept]
