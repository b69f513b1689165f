"""Wanda (Sun et al. 2023): a weight counts as much as its size times the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.weights import ScoredPruner, input_norms
from local_prune.pruner import Task


@dataclass(frozen=True)
class WandaPruner(ScoredPruner):
    """|W_ij| ||X_j||_2, compared per output (Sun et al. 2023, equation 1): `prune=wanda`."""

    name: ClassVar[str] = "wanda"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij| ||X_j||_2."""
        return task.dense.float().abs() * input_norms(task)
