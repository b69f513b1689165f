"""AMP (attention heads and MLP pruning): members that put the least into the layer's output go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.members import MembersPruner, best
from local_prune.pruner import Task
from local_prune.statistics import finite
from supernet.candidates import Candidate, Members


@dataclass
class Projected:
    """Sums over the calibration tokens of what each member puts into the layer's output: AMP's scores.

    Of heads that is ||x_h W_h||_1, with x_h (width,) the head's inputs and W_h its columns of the weight. Of a neuron
    (width 1) it is |x_j| alone, without the weight, as in the authors' code (c2d-usp/Efficient-LLMs-with-AMP,
    amp_criterion.py).

    Attributes:
        weight: (members, width, d_out) float32; nothing of neurons.
        total: (members,) float64.
        tokens: Rows of X so far.
    """

    weight: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, dense: Tensor, width: int) -> Projected:
        """Before any batch, for a layer of weight (d_out, members * width)."""
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
        """See `Statistics`."""
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """(members,) float32."""
        return (self.total / max(1, self.tokens)).float()


@dataclass(frozen=True)
class AmpPruner(MembersPruner):
    """Members that put the least into the output go first: AMP (attention heads and MLP pruning), see `Projected`."""

    name: ClassVar[str] = "amp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Projected:
        """Of each member's output."""
        return Projected.zeros(dense, width)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        assert isinstance(task.statistics, Projected)
        return [Members(members, None) for members in best(finite(task.statistics.mean, task.where), kept)]
