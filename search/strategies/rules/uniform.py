"""The same sparsity everywhere: what any search should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from search.budgets import knapsack
from search.strategies.base import Problem
from search.strategies.rules.base import Rule
from supernet.space import Allocation


@dataclass(frozen=True)
class Uniform(Rule):
    """The uniform allocation of the space, whatever an earlier round found."""

    name: ClassVar[str] = "uniform"
    looks_at: ClassVar[str] = "the budget alone"

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Take the uniform allocation, or the start where the budget does not allow that."""
        even = knapsack.uniform(problem.space, problem.budget)
        return even if problem.allows(even) else problem.start, 0
