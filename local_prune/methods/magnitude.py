"""Magnitude (Han et al. 2015): a weight counts as much as its size, |W_ij|, wherever in the layer it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from local_prune.methods.shared.ranking import rank_in_layer
from local_prune.methods.shared.weights import ScoredPruner
from local_prune.pruner import Statistics, Task


@dataclass(frozen=True)
class MagnitudePruner(ScoredPruner):
    """The smallest weights of a layer go first: `prune=magnitude`."""

    name: ClassVar[str] = "magnitude"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij|."""
        return task.dense.float().abs()

    def rank(self, scores: Tensor) -> Tensor:
        """Unstructured, all weights of the layer are compared with each other."""
        return rank_in_layer(scores)

    def statistics(self, dense: Tensor, width: int) -> Statistics | None:
        """None, as the inputs play no part."""
        return None
