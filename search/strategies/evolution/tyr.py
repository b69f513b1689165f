"""Týr-the-Pruner's search (Li et al. 2025, arXiv:2503.09657): EvoPress within one kind of unit at a time.

As in their code, an offspring makes min(a, b) exchanges, a and b uniform in 1..4, attention with attention and MLP with
MLP: each kind keeps the share of the budget that it began with. Their rounds from coarse to fine around what was found
are the run's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from search.strategies.base import Problem
from search.strategies.evolution.base import Exchanges, exchange, few
from supernet.space import Allocation


@dataclass(frozen=True)
class Tyr(Exchanges):
    """Settings of Týr's search."""

    name: ClassVar[str] = "tyr"

    max_exchanges: int = 4

    def propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """Return the parent after a few exchanges, each within one kind of unit."""
        child = exchange(problem, parent, few(self.max_exchanges, rng), rng, within_kind=True)
        return child if child is not None and keeps_shares(problem, child) else None


def keeps_shares(problem: Problem, child: Allocation) -> bool:
    """Whether each kind costs what it costs at the start, to within its own smallest step.

    Levels of uneven costs would let a kind drift away in many small gains.
    """
    gained: defaultdict[str, int] = defaultdict(int)
    steps: defaultdict[str, list[int]] = defaultdict(list)
    for unit, costs, now, before in zip(
        problem.space.units, problem.budget.first.costs, child, problem.start, strict=True
    ):
        gained[unit.kind] += costs[now] - costs[before]
        steps[unit.kind] += [a - b for a, b in zip(costs, costs[1:], strict=False) if a > b]
    return all(abs(gain) < min(steps[kind], default=1) for kind, gain in gained.items())
