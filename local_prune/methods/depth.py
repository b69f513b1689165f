"""Depth: a sub-block or a block is present or dropped, as in EvoPress (Sieberling et al. 2024).

Nothing is computed here: which ones go is the search's business.
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
    """Sub-blocks go on their own, or blocks as a whole: `prune=depth`.

    Attributes:
        whole_blocks: Whether a unit is a whole block.
    """

    name: ClassVar[str] = "depth"
    version: ClassVar[int] = 1

    whole_blocks: bool = False

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """Every sub-block, or every block."""
        return presence_prunables(parts, self.whole_blocks)

    def statistics(self, dense: Tensor, width: int) -> None:
        """None, as the inputs play no part."""
        return None

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """The one candidate that there is: nothing."""
        return [Dropped() for _ in kept]
