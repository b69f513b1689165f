"""(1 + lambda) evolution with multi-step selection: what EvoPress, Týr-the-Pruner and plain random search share.

They differ only in the offspring that they propose. All offspring of a generation are measured on few tokens, the best
of them on more, and so on. In the last step the parent is measured, too, and stays unless it is beaten. Every step
draws its own sequences, as in the papers.
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

ATTEMPTS = 50  # how often proposing is tried, for each offspring wanted, before a generation makes do with fewer


@dataclass(frozen=True)
class Evolution(StrategyDefaults, ABC):
    """Settings and course of an evolutionary search; a subclass says in `propose` how an offspring is made.

    Attributes:
        generations: How many generations a round has.
        offspring: How many allocations a generation proposes.
        tokens: How many tokens an allocation is measured on in each selection step, not falling.
        survivors: How many allocations are left after each selection step, not rising; the last number is 1.
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
        """Return an offspring of the parent that the problem allows, or None if this attempt failed."""

    def begin(self, problem: Problem, seed: int) -> State:
        """Return a plain state at the start: evolution remembers nothing else."""
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
        """Propose distinct offspring that differ from the parent; fewer than asked for if no more are found."""
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
        max_exchanges: How many exchanges an offspring makes at most.
    """

    max_exchanges: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_exchanges", self.max_exchanges, 1)


def draw(tokens: int, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct sequences of the pool that hold at least so many tokens, or all of them if they hold fewer."""
    return rng.permutation(problem.evaluate.sequences)[: sequences_for(tokens, problem)]


def exchange(
    problem: Problem, parent: Allocation, count: int, rng: np.random.Generator, within_kind: bool = False
) -> Allocation | None:
    """Switch levels between random units: each switch makes one unit a level denser and another one a level sparser.

    If these levels differ in cost, other random units go a level sparser to pay for the rest, or a level denser to
    spend it, until the budget is met.

    Args:
        problem: The problem, whose budget is to be met.
        parent: An allocation that the budget allows.
        count: How many switches are made; they may undo each other.
        rng: The random generator to draw from.
        within_kind: Whether units trade only with units of their own kind, such as attention with attention.

    Returns:
        The child, or None if this attempt did not end at an allocation that the problem allows.
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
    """Return which of the units can go a level denser with what is left of the budget."""
    rooms = [(limit.costs, limit.target - limit.cost(levels)) for limit in budget.limits]
    return [
        i for i in units if levels[i] > 0 and all(c[i][levels[i] - 1] - c[i][levels[i]] <= room for c, room in rooms)
    ]


def few(most: int, rng: np.random.Generator) -> int:
    """Draw min(a, b), with a and b uniform in 1..most: a number that is small most of the time."""
    return int(rng.integers(1, most + 1, size=2).min())


def _one(units: Iterable[int], rng: np.random.Generator) -> int | None:
    choice = list(units)
    return choice[int(rng.integers(len(choice)))] if choice else None
