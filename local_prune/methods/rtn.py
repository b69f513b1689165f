"""Rounding to nearest (RTN): every weight to the nearest value of its grid, without calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.grids import GridPruner, Layout, grids, quantised
from local_prune.pruner import Task
from supernet.candidates import Candidate, Quantised


def round_to_nearest(W: Tensor, bits: int, layout: Layout) -> Quantised:
    """Put each weight of W (d_in, d_out) float32 on the nearest value of its grid."""
    found = grids(W, bits, layout)
    codes = found.steps(W.reshape(-1, layout.group, W.shape[1]), bits) + found.zero.unsqueeze(1)
    return quantised(codes.view(W.shape), found, bits, layout.dtype)


@dataclass(frozen=True)
class RtnPruner(GridPruner):
    """Rounding to nearest, without calibration: `prune=rtn`."""

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> None:
        """None, as the inputs play no part."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One candidate for each width in `kept`."""
        layout = self.layout(task)
        W = task.dense.T.float().contiguous()
        return [round_to_nearest(W, bits, layout) for bits in kept]
