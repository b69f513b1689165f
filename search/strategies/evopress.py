"""EvoPress (Sieberling, Kuznedelev, Kurtic and Alistarh 2024, arXiv:2410.14649): evolution by switches between any units.

As in their code, an offspring makes min(a, b) switches, a and b uniform in 1..3. There, all levels of all layers lie as many
weights apart; here levels may differ in cost, and random units pay or spend the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search.strategies.base import Problem
from search.strategies.checks import check_whole
from search.strategies.evolution import Evolution, exchange, few
from supernet.space import Allocation


@dataclass(frozen=True)
class EvoPress(Evolution):
    """Settings of EvoPress.

    Attributes:
        max_exchanges: The most switches that an offspring makes.
    """

    max_exchanges: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_exchanges", self.max_exchanges, 1)

    def propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """See `Evolution`."""
        return exchange(problem, parent, few(self.max_exchanges, rng), rng)
