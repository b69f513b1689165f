"""FLAP (An et al. 2024): members whose output varies least go first, and a bias takes the place of its mean.

The score of a member is Var(x_j) ||W_:j||^2, the variance of its inputs weighted by their columns (the paper's WIFV),
which is what a bias cannot make up for.

FLAP also standardises its scores, so that those of all layers can be sorted into one global allocation. Here they are
compared within a unit alone: how much of each unit stays is what the search finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.members import ScoredMembersPruner
from local_prune.pruner import Task
from local_prune.statistics import Moments, finite
from supernet.candidates import member_columns
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable, member_prunables


def fluctuation(dense: Tensor, variance: Tensor, width: int) -> Tensor:
    """Weighted input feature variance Var(x_j) ||W_:j||^2 (An et al. 2024, WIFV), as root mean square over a member's
    columns.

    The authors' code takes the mean of the squares for heads, which is the same order, and the variance itself for
    neurons, which is the root of its square.

    Args:
        dense: W, (d_out, d_in).
        variance: Var(x_j) over the tokens, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    metric = dense.detach().float().square().sum(0) * variance
    return metric.double().view(-1, width).square().mean(1).sqrt().float()  # squares of small float32 numbers may be 0


def compensation(dense: Tensor, bias: Tensor | None, mean: Tensor, kept: Tensor, width: int) -> Tensor:
    """The bias with which the mean output stays that of the dense layer: b + sum over removed j of W_:j E[x_j].

    Args:
        dense: W, (d_out, d_in).
        bias: b of the dense layer, (d_out,), or None.
        mean: E[x_j] over the tokens, (d_in,).
        kept: The members that stay, (k,).
        width: Columns per member.

    Returns:
        (d_out,) in the dtype of `dense`.
    """
    removed = mean.index_fill(0, member_columns(kept, width), 0.0)
    output = dense.detach().float() @ removed
    return (output if bias is None else output + bias.detach().float()).to(dense.dtype)


@dataclass(frozen=True)
class FlapPruner(ScoredMembersPruner):
    """Members whose output varies least go first: `prune=flap`.

    Attributes:
        compensate: Whether candidates have a bias that keeps the mean output.
    """

    name: ClassVar[str] = "flap"
    version: ClassVar[int] = 1

    compensate: bool = True

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """The members of every sub-block; levels pay for the bias that candidates bring."""
        return member_prunables(parts, self.multiple, self.query_heads, self.compensate)

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """Means and variances of the inputs are taken from their moments."""
        return Moments.zeros(dense.shape[1], dense.device)

    def scores(self, task: Task) -> Tensor:
        """`fluctuation` of the layer that ends the sub-block."""
        assert isinstance(task.statistics, Moments)
        return finite(fluctuation(task.dense, task.statistics.variance, task.width), task.where)

    def bias(self, task: Task, kept: Tensor) -> Tensor | None:
        """The bias that makes up for what is gone. Without members the sub-block is absent and has no bias either."""
        assert isinstance(task.statistics, Moments)
        if not self.compensate or not len(kept):
            return None
        return compensation(task.dense, task.bias, finite(task.statistics.mean, task.where), kept, task.width)
