"""Wanda (Sun et al. 2023, equation 1): a weight counts as much as its size times the norm of its input.

The score of the weight of output i and input j is |W_ij| ||X_j||_2, with ||X_j||_2 taken over all calibration tokens.
It is compared among the weights of one output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.weights import ScoredPruner, input_norms
from local_prune.pruner import Task


@dataclass(frozen=True)
class WandaPruner(ScoredPruner):
    """Each output loses the weights with the smallest |W_ij| ||X_j||_2: `prune=wanda`."""

    name: ClassVar[str] = "wanda"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij| ||X_j||_2."""
        return task.dense.float().abs() * input_norms(task)
