"""(1 + lambda) evolution with level exchanges and multi-step selection (EvoPress, Sieberling et al. 2024; Týr-the-Pruner).

Each offspring is its parent with a few exchanges: units become denser by a level, others pay for it with a level of theirs, of
any kind, until the budget is met again to within one smallest step. All offspring are measured on few tokens, the best of them on
more, and the last ones together with the parent on the same tokens: the parent stays unless it is beaten there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        survivors = list(self.survivors)
        if self.generations < 0 or self.offspring < 1 or self.max_exchanges < 1:
            raise InputError("strategy.generations must be at least 0, strategy.offspring and strategy.max_exchanges at least 1")
        if not survivors or len(survivors) != len(self.tokens) or survivors[-1] != 1 or min(survivors) < 1:
            raise InputError(
                f"strategy.survivors={survivors} must have one number for each of strategy.tokens={list(self.tokens)} "
                "and end in 1; for example survivors=[4,1] tokens=[512,4096]"
            )
        if survivors != sorted(survivors, reverse=True) or min(self.tokens) < 1:
            raise InputError(
                f"strategy.survivors={survivors} must not rise, and strategy.tokens={list(self.tokens)} must be above 0"
            )

    @property
    def tokens_per_generation(self) -> int:
        """See `Strategy`."""
        measured = [self.offspring, *self.survivors[:-1]]
        return sum(count * tokens for count, tokens in zip(measured, self.tokens, strict=True)) + self.tokens[-1]

    def begin(self, problem: Problem, seed: int) -> State:
        """See `Strategy`."""
        rng = np.random.Generator(np.random.PCG64(seed))
        return State(problem.start, float("nan"), 0, 0, cast(dict[str, Any], rng.bit_generator.state))

    def advance(self, problem: Problem, state: State) -> tuple[State, list[Row]]:
        """See `Strategy`."""
        rng = state.generator()
        alive = self._propose(problem, state.parent, rng)
        if not alive:
            return replace(state, exhausted=True), []
        rows: list[Row] = []
        fitness = np.empty(0)
        for step, (tokens, survivors) in enumerate(zip(self.tokens, self.survivors, strict=True)):
            if step == len(self.survivors) - 1:
                alive = [state.parent, *alive]  # first, so that it wins a tie
            chosen = draw(problem, tokens, rng)
            start = time.perf_counter()
            fitness = problem.evaluate(alive, chosen)
            seconds = time.perf_counter() - start
            order = np.argsort(fitness, kind="stable")[:survivors]
            measured = len(chosen) * problem.evaluate.sequence_length
            rows += [
                Row(state.generation, step, measured, float(fitness[i]), i in order, seconds, allocation)
                for i, allocation in enumerate(alive)
            ]
            alive, fitness = [alive[i] for i in order], fitness[order]
        spent = state.tokens + sum(row.tokens for row in rows)
        rng_state = cast(dict[str, Any], rng.bit_generator.state)
        return State(alive[0], float(fitness[0]), state.generation + 1, spent, rng_state), rows

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


def draw(problem: Problem, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of random sequences of the pool, together at least `tokens` long (or the whole pool)."""
    count = -(-tokens // problem.evaluate.sequence_length)
    return rng.choice(problem.evaluate.sequences, size=min(count, problem.evaluate.sequences), replace=False)


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
