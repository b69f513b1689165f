"""The seam between search strategies and the rest: what a strategy is given, and the state it can be resumed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from search.budget import Budget
from search.evaluator import Evaluator
from supernet.space import Allocation, Space


@dataclass(frozen=True)
class Problem:
    """Find the allocation of `space` that meets `budget` with the smallest fitness, beginning at `start`."""

    space: Space
    budget: Budget
    start: Allocation
    evaluate: Evaluator

    @property
    def floor(self) -> int:
        """The least an allocation may cost: within one smallest step of the budget, or what the start costs if less."""
        return min(self.budget.target - max(1, self.space.smallest_step) + 1, self.space.cost(self.start))


@dataclass(frozen=True)
class State:
    """All that a strategy remembers between generations; JSON-able, so that a killed run goes on exactly.

    Attributes:
        parent: The best allocation so far.
        fitness: Its fitness where it was last measured; NaN before that.
        generation: Generations done.
        tokens: Forward tokens spent (each sequence counted for each allocation measured on it).
        rng: State of numpy's PCG64.
        exhausted: No further allocation can be proposed.
    """

    parent: Allocation
    fitness: float
    generation: int
    tokens: int
    rng: dict[str, Any]
    exhausted: bool = False

    def generator(self) -> np.random.Generator:
        """The random generator as it was left."""
        bits = np.random.PCG64()
        bits.state = cast(Any, self.rng)
        return np.random.Generator(bits)


@dataclass(frozen=True)
class Row:
    """One evaluated allocation in one selection step: a row of `history.parquet`."""

    generation: int
    step: int
    tokens: int
    fitness: float
    survived: bool
    seconds: float
    allocation: Allocation


class Strategy(Protocol):
    """A search that advances generation by generation."""

    generations: int

    @property
    def tokens_per_generation(self) -> int:
        """About how many forward tokens a generation costs."""
        ...

    def begin(self, problem: Problem, seed: int) -> State:
        """The state before the first generation."""
        ...

    def advance(self, problem: Problem, state: State) -> tuple[State, list[Row]]:
        """One generation further, and what was measured on the way."""
        ...
