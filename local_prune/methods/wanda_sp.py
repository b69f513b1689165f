"""Wanda-sp: Wanda's score by members, a baseline in the paper of FLAP (An et al. 2024).

The score of a member is the mean of |W_ij| ||X_j||_2 over all outputs i and over its input columns j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.members import ScoredMembersPruner
from local_prune.pruner import Task
from local_prune.statistics import Moments, finite


def wanda_sp(dense: Tensor, norms: Tensor, width: int) -> Tensor:
    """Mean of |W_ij| ||X_j||_2 over the outputs and over the columns of a member, as in FLAP's code.

    Args:
        dense: W, (d_out, d_in).
        norms: ||X_j||_2, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    return (dense.detach().float().abs().mean(0) * norms).view(-1, width).mean(1)


@dataclass(frozen=True)
class WandaSpPruner(ScoredMembersPruner):
    """Members with the smallest weights times inputs go first: `prune=wanda_sp`."""

    name: ClassVar[str] = "wanda_sp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """The norms of the inputs are taken from their moments."""
        return Moments.zeros(dense.shape[1], dense.device)

    def scores(self, task: Task) -> Tensor:
        """`wanda_sp` of the layer that ends the sub-block."""
        assert isinstance(task.statistics, Moments)
        return finite(wanda_sp(task.dense, task.statistics.norms, task.width), task.where)
