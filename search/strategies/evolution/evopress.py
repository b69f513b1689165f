"""EvoPress (Sieberling, Kuznedelev, Kurtic and Alistarh 2024, arXiv:2410.14649): evolution by switches between units.

As in the authors' code, an offspring makes min(a, b) switches, with a and b uniform in 1..3, between any two units. In
their code all levels of all layers are equally many weights apart; here levels may differ in cost, and random other
units pay or spend the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from search.strategies.base import Problem
from search.strategies.evolution.base import Exchanges, exchange, few
from supernet.space import Allocation


@dataclass(frozen=True)
class EvoPress(Exchanges):
    """Settings of EvoPress."""

    name: ClassVar[str] = "evopress"

    max_exchanges: int = 3

    def propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """Return the parent after a few exchanges between any units."""
        return exchange(problem, parent, few(self.max_exchanges, rng), rng)
