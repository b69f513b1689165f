"""Gives every unit the same sparsity, as nearly as the levels allow: the baseline that any search should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from search.budgets import knapsack
from search.strategies.base import Problem
from search.strategies.rules.base import Rule
from supernet.space import Allocation


@dataclass(frozen=True)
class Uniform(Rule):
    """The rule that takes the uniform allocation of the space, whatever an earlier round found."""

    name: ClassVar[str] = "uniform"
    looks_at: ClassVar[str] = "the budget alone"

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Return the uniform allocation, or the start if the budget does not allow that; no tokens are needed."""
        even = knapsack.uniform(problem.space, problem.budget)
        return even if problem.allows(even) else problem.start, 0
