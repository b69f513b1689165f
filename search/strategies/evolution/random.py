"""Random search: allocations drawn around the start, measured as evolution measures its offspring, the best one kept.

Every unit wishes for a cost between that of the start's level and that of a level drawn uniformly from all of its own.
What all units wish for is then moved to the budget, by about the same sparsity everywhere. This is a baseline: what a
guided search finds beyond it is due to the guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from search.budgets.knapsack import relaxed
from search.strategies.base import Problem
from search.strategies.evolution.base import Evolution
from supernet.errors import InputError
from supernet.space import Allocation


@dataclass(frozen=True)
class Random(Evolution):
    """Settings of the random search.

    Attributes:
        spread: How far from the start allocations are drawn: near 0 close to it, 1 anywhere in the space.
    """

    name: ClassVar[str] = "random"

    spread: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.spread) not in (int, float) or not 0.0 < self.spread <= 1.0:
            raise InputError(
                f"strategy.spread={self.spread} must be a number above 0 and at most 1; 1 draws from all levels"
            )

    def propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """Return an allocation drawn around the start, whatever the parent is."""
        limit = problem.budget.leading
        losses = []
        for row, level in zip(limit.costs, problem.start, strict=True):
            costs = np.array(row, dtype=np.float64)
            wish = costs[level] + self.spread * (costs[rng.integers(len(costs))] - costs[level])
            losses.append((costs - wish) ** 2 / max(1.0, costs[0]))  # so that one price moves all alike in sparsity
        child = relaxed(losses, problem.budget)
        return child if problem.allows(child) else None
