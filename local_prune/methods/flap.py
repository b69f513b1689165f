"""FLAP (An et al. 2024): members whose output varies least go first, and a bias takes the place of its mean.

FLAP also standardises its scores, so that those of all layers can be sorted into one global allocation. Here they are
compared within a unit alone: how much of each unit stays is what the search finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.members import MembersPruner, best
from local_prune.pruner import Task
from local_prune.statistics import Moments, finite
from supernet.candidates import Candidate, Members, member_columns
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable, member_prunables


def fluctuation(dense: Tensor, variance: Tensor, width: int) -> Tensor:
    """FLAP's weighted input feature variance, Var(x_j) ||W_:j||^2 (An et al. 2024, WIFV): what a bias cannot make up
    for.

    The root mean square over the columns of a member. The authors' code takes the mean of the squares for heads, which
    is the same order, and the variance itself for neurons, which is the root of its square.

    Args:
        dense: (d_out, d_in).
        variance: Of each input over the tokens, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    metric = dense.detach().float().square().sum(0) * variance
    return metric.double().view(-1, width).square().mean(1).sqrt().float()  # squares of small float32 numbers may be 0


def compensation(dense: Tensor, bias: Tensor | None, mean: Tensor, kept: Tensor, width: int) -> Tensor:
    """The bias with which the mean output stays that of the dense layer (FLAP, An et al. 2024).

    Args:
        dense: (d_out, d_in).
        bias: (d_out,) of the dense layer, or None.
        mean: Of each input over the tokens, (d_in,).
        kept: (k,) members.
        width: Columns per member.

    Returns:
        (d_out,) in the dtype of `dense`.
    """
    removed = mean.index_fill(0, member_columns(kept, width), 0.0)
    output = dense.detach().float() @ removed
    return (output if bias is None else output + bias.detach().float()).to(dense.dtype)


@dataclass(frozen=True)
class FlapPruner(MembersPruner):
    """Members whose output varies least go first, and a bias takes the place of its mean: `fluctuation` and
    `compensation`.

    Attributes:
        compensate: Whether candidates have that bias.
    """

    name: ClassVar[str] = "flap"
    version: ClassVar[int] = 1

    compensate: bool = True

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """See `Pruner`; a bias is paid for."""
        return member_prunables(parts, self.multiple, self.query_heads, self.compensate)

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """Of each input."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights. A level of no members is an absent sub-block and has no bias either."""
        assert isinstance(task.statistics, Moments)
        scores = finite(fluctuation(task.dense, task.statistics.variance, task.width), task.where)
        mean = finite(task.statistics.mean, task.where)
        candidates: list[Candidate] = []
        for members in best(scores, kept):
            bias = None
            if self.compensate and len(members):
                bias = compensation(task.dense, task.bias, mean, members, task.width)
            candidates.append(Members(members, None, bias))
        return candidates
