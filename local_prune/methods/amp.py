"""AMP (attention heads and MLP pruning): members that put the least into the layer's output go first.

The score of a head is the mean over the tokens of ||x_h W_h||_1, with x_h (width,) the head's inputs and W_h its
columns of the weight. The score of a neuron is the mean of |x_j| alone, without the weight, as in the authors' code
(c2d-usp/Efficient-LLMs-with-AMP, amp_criterion.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.members import ScoredMembersPruner
from local_prune.pruner import Task
from local_prune.statistics import finite


@dataclass
class Projected:
    """Sums over the calibration tokens of what each member puts into the layer's output.

    Attributes:
        weight: W_h of each head, (members, width, d_out) float32; empty for neurons, whose width is 1.
        total: The sums so far, (members,) float64.
        tokens: How many rows of X they are over.
    """

    weight: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, dense: Tensor, width: int) -> Projected:
        """The sums before any batch, for a layer of weight (d_out, members * width)."""
        members = dense.shape[1] // width
        weight = dense.detach().T.float().reshape(members, width, -1) if width > 1 else dense.new_empty(members, 1, 0)
        return cls(weight, torch.zeros(members, dtype=torch.float64, device=dense.device))

    def add(self, inputs: Tensor) -> None:
        """Add a batch: X (tokens, members * width), of any float dtype."""
        X = inputs.float()
        members, width, _ = self.weight.shape
        if width == 1:
            self.total += X.abs().sum(0)
        else:
            for member in range(members):  # all at once would take members times the memory of the layer's output
                output = X[:, member * width : (member + 1) * width] @ self.weight[member]
                self.total[member] += output.abs().sum()
        self.tokens += len(X)

    def merge(self, other: Projected) -> None:
        """Add the sums over other tokens."""
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """The scores, (members,) float32."""
        return (self.total / max(1, self.tokens)).float()


@dataclass(frozen=True)
class AmpPruner(ScoredMembersPruner):
    """Members that put the least into the output go first: `prune=amp`."""

    name: ClassVar[str] = "amp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Projected:
        """What each member puts into the output is summed as the tokens pass."""
        return Projected.zeros(dense, width)

    def scores(self, task: Task) -> Tensor:
        """The mean of what each member puts into the output."""
        assert isinstance(task.statistics, Projected)
        return finite(task.statistics.mean, task.where)
