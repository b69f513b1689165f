"""Wanda-sp: Wanda's score of weights, taken together by members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.members import MembersPruner, best
from local_prune.pruner import Task
from local_prune.statistics import Moments, finite
from supernet.candidates import Candidate, Members


def wanda_sp(dense: Tensor, norms: Tensor, width: int) -> Tensor:
    """Wanda's |W_ij| ||X_j||_2 by members (Wanda-sp, a baseline of FLAP, An et al. 2024).

    The mean over the outputs and over the columns of a member, as in FLAP's code.

    Args:
        dense: (d_out, d_in).
        norms: ||X_j||_2, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    return (dense.detach().float().abs().mean(0) * norms).view(-1, width).mean(1)


@dataclass(frozen=True)
class WandaSpPruner(MembersPruner):
    """Members with the smallest weights times inputs go first: `wanda_sp`."""

    name: ClassVar[str] = "wanda_sp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """Of each input."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        assert isinstance(task.statistics, Moments)
        scores = finite(wanda_sp(task.dense, task.statistics.norms, task.width), task.where)
        return [Members(members, None) for members in best(scores, kept)]
