"""(1 + lambda) evolution with multi-step selection: what EvoPress, Týr-the-Pruner and plain random search share.

They differ in what they propose. All offspring of a generation are measured on few tokens, the best of them on more,
and the last ones together with the parent, which stays unless it is beaten there. Every step draws sequences of its
own, as published.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.budgets.budget import Budget
from search.strategies.base import HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_steps, check_whole
from search.strategies.measuring import Measured, sequences_for
from search.strategies.state import State, rng_state
from supernet.space import Allocation

ATTEMPTS = 50  # tries for each offspring before the space counts as exhausted


@dataclass(frozen=True)
class Evolution(StrategyDefaults, ABC):
    """What every such search is told.

    Attributes:
        generations: How many.
        offspring: Allocations proposed a generation.
        tokens: Tokens an allocation is measured on in each selection step, not falling.
        survivors: Allocations left after each step, not rising; the last is 1.
    """

    generations: int
    offspring: int
    tokens: Sequence[int]
    survivors: Sequence[int]

    def __post_init__(self) -> None:
        check_whole("generations", self.generations, 0)
        check_whole("offspring", self.offspring, 1)
        check_steps(self.tokens, self.survivors)

    @property
    def tokens_per_generation(self) -> int:
        """Count what enters each selection step, and the parent in the last one."""
        return int(np.dot([self.offspring, *self.survivors[:-1]], self.tokens)) + self.tokens[-1]

    @abstractmethod
    def propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """One allocation that the problem allows; None where the attempt failed."""

    def begin(self, problem: Problem, seed: int) -> State:
        """Begin at the start; there is nothing else to remember."""
        return State.first(problem.start, seed)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Propose offspring, select among them step by step, and compare the last ones with the parent."""
        rng = state.generator()
        alive = self._offspring(problem, state.parent, rng)
        if not alive:
            return replace(state, exhausted=True), []
        race = Measured(problem, state.generation)
        for tokens, survivors in zip(self.tokens[:-1], self.survivors[:-1], strict=True):
            alive = race.step(alive, draw(tokens, problem, rng), survivors)
        last = draw(self.tokens[-1], problem, rng)
        (best,) = race.step([state.parent, *alive], last, 1)  # the parent first: it wins a tie
        fitness = float(race.losses([best], last).mean())
        return State(best, fitness, state.generation + 1, state.tokens + race.tokens, rng_state(rng)), race.rows

    def _offspring(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> list[Allocation]:
        """Distinct, none like the parent; fewer than asked for where the space holds no more."""
        found: dict[Allocation, None] = {}
        for _ in range(self.offspring * ATTEMPTS):
            child = self.propose(problem, parent, rng)
            if child is not None and child != parent:
                found.setdefault(child)
            if len(found) == self.offspring:
                break
        return list(found)


@dataclass(frozen=True)
class Exchanges(Evolution):
    """Evolution whose offspring are the parent after a few exchanges.

    Attributes:
        max_exchanges: The most that an offspring makes.
    """

    max_exchanges: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_exchanges", self.max_exchanges, 1)


def draw(tokens: int, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Distinct sequences of the pool that hold at least so many tokens, or all of them."""
    return rng.permutation(problem.evaluate.sequences)[: sequences_for(tokens, problem)]


def exchange(
    problem: Problem, parent: Allocation, count: int, rng: np.random.Generator, within_kind: bool = False
) -> Allocation | None:
    """The parent after `count` switches: each a random unit a level denser, and another one a level sparser.

    Where their levels differ in cost, random others pay for the rest with a level, or spend it, until the budget is
    met.

    Args:
        problem: Whose budget is to be met.
        parent: An allocation that the budget allows.
        count: Of switches; they may undo each other.
        rng: Where chance comes from.
        within_kind: Attention trades with attention alone, MLP with MLP.

    Returns:
        The child; None where the attempt ended at no allowed allocation.
    """
    budget, units = problem.budget, problem.space.units
    kinds = [unit.kind if within_kind else "" for unit in units]
    highest = [len(unit.levels) - 1 for unit in units]
    levels = list(parent)
    trading = set()
    for _ in range(count):
        denser = _one((i for i, level in enumerate(levels) if level > 0), rng)
        if denser is None:
            return None
        partners = (
            i for i, kind in enumerate(kinds) if kind == kinds[denser] and i != denser and levels[i] < highest[i]
        )
        sparser = _one(partners, rng)
        if sparser is None:
            return None
        levels[denser] -= 1
        levels[sparser] += 1
        trading.add(kinds[denser])
    others = [i for i, kind in enumerate(kinds) if kind in trading]
    while not budget.fits(levels):
        payer = _one((i for i in others if parent[i] <= levels[i] < highest[i]), rng)
        if payer is None:
            return None
        levels[payer] += 1
    while budget.left(levels) >= 1:
        spender = _one(affordable(budget, levels, (i for i in others if levels[i] <= parent[i])), rng)
        if spender is None:
            break
        levels[spender] -= 1
    child = tuple(levels)
    return child if problem.allows(child) else None


def affordable(budget: Budget, levels: Sequence[int], units: Iterable[int]) -> list[int]:
    """Those of the units that can go a level denser with what is left of the budget."""
    rooms = [(limit.costs, limit.target - limit.cost(levels)) for limit in budget.limits]
    return [
        i for i in units if levels[i] > 0 and all(c[i][levels[i] - 1] - c[i][levels[i]] <= room for c, room in rooms)
    ]


def few(most: int, rng: np.random.Generator) -> int:
    """min(a, b) with a and b uniform in 1..most: mostly one."""
    return int(rng.integers(1, most + 1, size=2).min())


def _one(units: Iterable[int], rng: np.random.Generator) -> int | None:
    choice = list(units)
    return choice[int(rng.integers(len(choice)))] if choice else None
