"""Steepest exchange: a greedy search that goes, in every generation, where single moves promise most.

A single move takes one unit one level denser or sparser, whatever the budget. Each move is measured by itself from the
parent, all on the same sequences, and the effects of several moves are assumed to add up. An exchange is a move
together with the moves that make up for its cost at the best price. The best exchange, the two best ones together and
so on are then measured against the parent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from search.strategies.base import HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_tokens, check_whole
from search.strategies.evolution.base import ATTEMPTS, affordable, draw, exchange
from search.strategies.measuring import Measured
from search.strategies.state import State, rng_state
from supernet.space import Allocation

DENSER, SPARSER = -1, 1
Move = tuple[int, int]  # a unit, and by how much its level changes
Effects = Mapping[Move, float]  # by how much each single move changes the fitness


@dataclass(frozen=True)
class Greedy(StrategyDefaults):
    """Settings of the steepest exchange.

    Attributes:
        generations: How many generations a round has.
        candidates: How many single moves a generation measures. If there are more, they are drawn at random: half of
            them go denser and half sparser.
        exchanges: How many exchanges are tried together at most.
        tokens: Two numbers: how many tokens a single move is measured on, and how many the comparison of exchanges with
            the parent takes.
    """

    name: ClassVar[str] = "greedy"

    generations: int
    candidates: int
    exchanges: int
    tokens: Sequence[int]

    def __post_init__(self) -> None:
        check_whole("generations", self.generations, 0)
        check_whole("candidates", self.candidates, 2)
        check_whole("exchanges", self.exchanges, 1)
        check_tokens(self.tokens, "a single move", "the comparison with the parent")

    @property
    def tokens_per_generation(self) -> int:
        """Count the single moves and the comparison of exchanges; both measure the parent, too."""
        single, last = self.tokens
        return (self.candidates + 1) * single + (self.exchanges + 1) * last

    def begin(self, problem: Problem, seed: int) -> State:
        """Return a plain state at the start: this search remembers nothing else."""
        return State.first(problem.start, seed)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Measure single moves, then compare the exchanges that they promise with the parent."""
        rng, parent = state.generator(), state.parent
        if not any(exchange(problem, parent, 1, rng) not in (None, parent) for _ in range(ATTEMPTS)):
            return replace(state, exhausted=True), []
        race = Measured(problem, state.generation)
        some = draw(self.tokens[0], problem, rng)
        children = self._measured_moves(problem, parent, race, some, rng)
        # Without children the parent stays, and its losses on the sequences of the moves are known.
        last = draw(self.tokens[1], problem, rng) if children else some
        (best,) = race.step([parent, *children], last, 1)  # the parent first: it wins a tie
        fitness = float(race.losses([best], last).mean())
        return State(best, fitness, state.generation + 1, state.tokens + race.tokens, rng_state(rng)), race.rows

    def _measured_moves(
        self, problem: Problem, parent: Allocation, race: Measured, sequences: np.ndarray, rng: np.random.Generator
    ) -> list[Allocation]:
        """Measure single moves, and return the allocations that they promise to be better than the parent."""
        begun = time.perf_counter()
        moves = self._moves(problem, parent, rng)
        measured = [parent, *(_moved(parent, [move]) for move in moves)]
        fitness = race.losses(measured, sequences).mean(1)
        effects = dict(zip(moves, effects_of(fitness), strict=True))
        children = list(best_exchanges(problem, parent, effects, self.exchanges))
        taken = {
            (i, DENSER if a < b else SPARSER)
            for c in children
            for i, (a, b) in enumerate(zip(c, parent, strict=True))
            if a != b
        }
        survived = {index for index, move in enumerate(moves, 1) if move in taken}
        race.note(measured, fitness, len(sequences), survived, time.perf_counter() - begun)
        return children

    def _moves(self, problem: Problem, parent: Allocation, rng: np.random.Generator) -> list[Move]:
        """Choose the single moves to measure: all of them, or about as many denser as sparser ones at random."""
        denser = [(i, DENSER) for i, level in enumerate(parent) if level > 0]
        sparser = [(i, SPARSER) for i, unit in enumerate(problem.space.units) if parent[i] + 1 < len(unit.levels)]
        half = max(self.candidates // 2, self.candidates - len(sparser))
        chosen = [denser[i] for i in np.sort(rng.permutation(len(denser))[:half])]
        rest = self.candidates - len(chosen)
        return chosen + [sparser[i] for i in np.sort(rng.permutation(len(sparser))[:rest])]


def effects_of(fitness: np.ndarray) -> list[float]:
    """Return by how much each move changes the fitness of the parent.

    From a parent with a finite fitness, a move to one that is not finite is infinitely bad. From a parent whose own
    fitness is not finite, a move to a finite one is a gain, and all other moves count as 0.

    Args:
        fitness: (1 + moves,), first the parent's and then that behind each move.
    """
    if np.isfinite(fitness[0]):
        return [float(effect) for effect in fitness[1:] - fitness[0]]
    finite = fitness[np.isfinite(fitness)]
    above = float(finite.max()) + 1.0 if len(finite) else 0.0
    return [float(one) - above if np.isfinite(one) else 0.0 for one in fitness[1:]]


def best_exchanges(problem: Problem, parent: Allocation, effects: Effects, count: int) -> Iterator[Allocation]:
    """Yield the parent after the most promising exchange, then after the two most promising ones, and so on.

    Every exchange is of units that those before it left alone. It ends after `count` exchanges, or when no exchange
    promises a gain.
    """
    at, free = parent, set(range(len(parent)))
    for _ in range(count):
        left = {move: effect for move, effect in effects.items() if move[0] in free}
        found = [completed(problem, at, move, left) for move in left]
        promising = [(change, child) for change, child in filter(None, found) if change < 0.0]
        if not promising:
            return
        before, (_, at) = at, min(promising)
        free -= {i for i, (a, b) in enumerate(zip(before, at, strict=True)) if a != b}
        yield at


def completed(problem: Problem, at: Allocation, first: Move, effects: Effects) -> tuple[float, Allocation] | None:
    """Complete a move to an exchange, by the moves that bring the allocation back to the budget at the best price.

    A unit may move by several levels; each of them is assumed to have the effect of the first.

    Returns:
        The sum of the effects and the allocation that the exchange leads to, or None if it cannot meet the budget.
    """
    budget, costs = problem.budget, problem.budget.leading.costs
    levels = list(_moved(at, [first]))
    change = effects[first]

    def take(moves: list[Move]) -> float | None:
        """Make the move whose effect is best for its cost, and return its effect; None if there is no move."""
        prices = [effects[(i, by)] / max(1, abs(costs[i][levels[i]] - costs[i][levels[i] + by])) for i, by in moves]
        if not moves:
            return None
        unit, by = moves[int(np.argmin(prices))]
        levels[unit] += by
        return effects[(unit, by)]

    while not budget.fits(levels):
        able = [(i, by) for i, by in effects if by == SPARSER and levels[i] >= at[i] and levels[i] + 1 < len(costs[i])]
        if (effect := take(able)) is None:
            return None
        change += effect
    while budget.left(levels) >= 1:
        able = [
            (i, DENSER)
            for i in affordable(budget, levels, (i for i, by in effects if by == DENSER and levels[i] <= at[i]))
        ]
        if (effect := take(able)) is None:
            break
        change += effect
    child = tuple(levels)
    return (change, child) if problem.allows(child) else None


def _moved(allocation: Allocation, moves: Sequence[Move]) -> Allocation:
    levels = list(allocation)
    for unit, by in moves:
        levels[unit] += by
    return tuple(levels)
