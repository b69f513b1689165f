"""(1 + lambda) evolution with level exchanges and multi-step selection (EvoPress, Sieberling et al. 2024; Týr-the-Pruner).

Each offspring is its parent with a few exchanges: units become denser by a level, others pay for it with a level of theirs, of
any kind, until the budget is met again to within one smallest step. All offspring are measured on few tokens, the best of them on
more, and the last ones together with the parent on the same tokens: the parent stays unless it is beaten there. Unlike the
published algorithms, a step adds tokens to those of the step before instead of drawing new ones (docs/experiments.md).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np

from search.strategies.base import Problem, Row, State
from supernet.errors import InputError
from supernet.space import Allocation

ATTEMPTS = 50  # tries for each offspring before the space counts as exhausted


@dataclass(frozen=True)
class Evolution:
    """Settings of the evolution.

    Attributes:
        generations: How many.
        offspring: Allocations proposed a generation.
        tokens: Tokens an allocation is measured on in each selection step, rising.
        survivors: Allocations left after each step; the last is 1.
        max_exchanges: An offspring makes min(a, b) exchanges, a and b uniform in 1..max_exchanges.
    """

    generations: int
    offspring: int
    tokens: Sequence[int]
    survivors: Sequence[int]
    max_exchanges: int = 3

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "max_exchanges"):
            if type(value := getattr(self, name)) is not int:
                raise InputError(f"strategy.{name}={value} must be a whole number")
        for name in ("tokens", "survivors"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or any(type(number) is not int for number in value):
                raise InputError(f"strategy.{name}={value} must be a list of whole numbers, one for each selection step")
        survivors = list(self.survivors)
        if self.generations < 0 or self.offspring < 1 or self.max_exchanges < 1:
            raise InputError("strategy.generations must be at least 0, strategy.offspring and strategy.max_exchanges at least 1")
        if not survivors or len(survivors) != len(self.tokens) or survivors[-1] != 1 or min(survivors) < 1:
            raise InputError(
                f"strategy.survivors={survivors} must have one number for each of strategy.tokens={list(self.tokens)} "
                "and end in 1; for example survivors=[4,1] tokens=[512,4096]"
            )
        if survivors != sorted(survivors, reverse=True) or min(self.tokens) < 1 or list(self.tokens) != sorted(self.tokens):
            raise InputError(
                f"strategy.survivors={survivors} must not rise, and strategy.tokens={list(self.tokens)} must be above 0 "
                "and not fall; for example survivors=[4,1] tokens=[512,4096]"
            )

    @property
    def tokens_per_generation(self) -> int:
        """See `Strategy`."""
        measured = [self.offspring, *self.survivors[:-1]]
        added = np.diff([0, *self.tokens])
        return int(np.dot(measured, added)) + self.tokens[-1]

    def begin(self, problem: Problem, seed: int) -> State:
        """See `Strategy`."""
        rng = np.random.Generator(np.random.PCG64(seed))
        return State(problem.start, float("nan"), 0, 0, cast(dict[str, Any], rng.bit_generator.state))

    def advance(self, problem: Problem, state: State) -> tuple[State, list[Row]]:
        """See `Strategy`."""
        rng = state.generator()
        offspring = self._propose(problem, state.parent, rng)
        if not offspring:
            return replace(state, exhausted=True), []
        order = rng.permutation(problem.evaluate.sequences)
        race = _Race(problem, state.generation)
        for tokens, survivors in zip(self.tokens[:-1], self.survivors[:-1], strict=True):
            offspring = race.step(offspring, order[: sequences_for(tokens, problem)], survivors)
        last = order[: sequences_for(self.tokens[-1], problem)]
        (best,) = race.step([state.parent, *offspring], last, 1)  # the parent first: it wins a tie
        rng_state = cast(dict[str, Any], rng.bit_generator.state)
        return State(best, race.fitness(best), state.generation + 1, state.tokens + race.tokens, rng_state), race.rows

    def _propose(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> list[Allocation]:
        """Distinct offspring, none like the parent; fewer than asked for where the space holds no more."""
        found: dict[Allocation, None] = {}
        for _ in range(self.offspring * ATTEMPTS):
            exchanges = int(rng.integers(1, self.max_exchanges + 1, size=2).min())
            child = exchange(problem, parent, exchanges, rng)
            if child is not None and child != parent:
                found.setdefault(child)
            if len(found) == self.offspring:
                break
        return list(found)


class _Race:
    """Selection steps of one generation. Each measures on the sequences of the step before and some more, the same for all."""

    def __init__(self, problem: Problem, generation: int) -> None:
        self.problem, self.generation = problem, generation
        self.rows: list[Row] = []
        self.tokens = 0  # forward tokens spent
        self._steps = 0
        self._sums: defaultdict[Allocation, float] = defaultdict(float)  # of the fitness over the sequences measured so far
        self._counts: defaultdict[Allocation, int] = defaultdict(int)  # how many those are, the first of the step's

    def step(self, alive: list[Allocation], sequences: np.ndarray, survivors: int) -> list[Allocation]:
        """The fittest of `alive` on these sequences, of which those already measured count again without a forward pass."""
        start = time.perf_counter()
        for start_at, end in pairwise(sorted({*(self._counts[allocation] for allocation in alive), len(sequences)})):
            self._measure([a for a in alive if self._counts[a] == start_at], sequences[start_at:end])
        seconds = time.perf_counter() - start
        fitness = [self.fitness(allocation) for allocation in alive]
        best = np.argsort(fitness, kind="stable")[:survivors]
        tokens = len(sequences) * self.problem.evaluate.sequence_length
        self.rows += [
            Row(self.generation, self._steps, tokens, fitness[i], i in best, seconds, allocation)
            for i, allocation in enumerate(alive)
        ]
        self._steps += 1
        return [alive[i] for i in best]

    def fitness(self, allocation: Allocation) -> float:
        """Mean fitness on the sequences measured so far."""
        return self._sums[allocation] / self._counts[allocation]

    def _measure(self, alive: list[Allocation], sequences: np.ndarray) -> None:
        for allocation, value in zip(alive, self.problem.evaluate(alive, sequences), strict=True):
            self._sums[allocation] += float(value) * len(sequences)
            self._counts[allocation] += len(sequences)
        self.tokens += len(alive) * len(sequences) * self.problem.evaluate.sequence_length


def sequences_for(tokens: int, problem: Problem) -> int:
    """Sequences that hold at least `tokens` tokens, or the whole pool."""
    return min(-(-tokens // problem.evaluate.sequence_length), problem.evaluate.sequences)


def exchange(problem: Problem, parent: Allocation, count: int, rng: np.random.Generator) -> Allocation | None:
    """The parent with `count` units a level denser, and others sparser until the budget is met; None where that fails."""
    space, target = problem.space, problem.budget.target
    levels = list(parent)
    denser = rng.permutation([i for i, level in enumerate(levels) if level > 0])[:count]
    for unit in denser:
        levels[unit] -= 1
    cost = space.cost(levels)
    payers = [i for i in range(len(levels)) if i not in denser]
    while cost > target:
        able = [i for i in payers if levels[i] + 1 < len(space.units[i].levels)]
        if not able:
            return None
        unit = int(rng.choice(able))
        cost += _step(problem, levels, unit, +1)
    while target - cost >= space.smallest_step:  # what is left of the budget is spent, by units that did not pay
        able = [
            i for i, level in enumerate(levels) if 0 < level <= parent[i] and cost + _difference(problem, levels, i, -1) <= target
        ]
        if not able:
            break
        unit = int(rng.choice(able))
        cost += _step(problem, levels, unit, -1)
    return tuple(levels) if problem.floor <= cost <= target else None


def _difference(problem: Problem, levels: Sequence[int], unit: int, by: int) -> int:
    """Change in cost when a unit moves `by` levels."""
    choices = problem.space.units[unit].levels
    return choices[levels[unit] + by].cost - choices[levels[unit]].cost


def _step(problem: Problem, levels: list[int], unit: int, by: int) -> int:
    change = _difference(problem, levels, unit, by)
    levels[unit] += by
    return change
