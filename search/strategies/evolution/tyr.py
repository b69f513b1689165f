"""Týr-the-Pruner's search (Li et al. 2025, arXiv:2503.09657): as EvoPress, but units trade only within their kind.

As in the authors' code, an offspring makes min(a, b) exchanges, with a and b uniform in 1..4, of attention with
attention and of MLP with MLP, so that each kind keeps the share of the budget that it began with. The paper's rounds
from coarse to fine levels are done by the run, for every strategy.
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
    """Return whether each kind of unit costs as much as at the start, to within its own smallest step.

    Without this check, levels of uneven costs would let a kind drift away in many small gains.
    """
    gained: defaultdict[str, int] = defaultdict(int)
    steps: defaultdict[str, list[int]] = defaultdict(list)
    for unit, costs, now, before in zip(
        problem.space.units, problem.budget.first.costs, child, problem.start, strict=True
    ):
        gained[unit.kind] += costs[now] - costs[before]
        steps[unit.kind] += [a - b for a, b in zip(costs, costs[1:], strict=False) if a > b]
    return all(abs(gain) < min(steps[kind], default=1) for kind, gain in gained.items())
