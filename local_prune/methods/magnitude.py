"""Magnitude (Han et al. 2015): the weights that are smallest go, wherever in the layer they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.ranking import rank_in_layer
from local_prune.methods.shared.weights import ScoredPruner
from local_prune.pruner import Task
from local_prune.statistics import LeastSquares, Moments


@dataclass(frozen=True)
class MagnitudePruner(ScoredPruner):
    """|W|, compared over the whole layer: `prune=magnitude`."""

    name: ClassVar[str] = "magnitude"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij|."""
        return task.dense.float().abs()

    def rank(self, scores: Tensor) -> Tensor:
        """Order of removal in the unstructured case: compared over the whole layer."""
        return rank_in_layer(scores)

    def statistics(self, dense: Tensor, width: int) -> LeastSquares | Moments | None:
        """None: the inputs do not matter."""
        return None
