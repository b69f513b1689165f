"""Steepest exchange: every generation goes where single moves, measured one by one, promise most.

A single move takes one unit a level denser or sparser, whatever the budget. The effects of moves are measured from the
parent, on the same sequences, and taken to add up. An exchange is a move and those that make up for its cost at the
best price. The best exchange, the two best ones together, ... are then measured against the parent.
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
Effects = Mapping[Move, float]  # of single moves on the fitness


@dataclass(frozen=True)
class Greedy(StrategyDefaults):
    """Settings of the steepest exchange.

    Attributes:
        generations: How many.
        candidates: Single moves measured a generation; where there are more, half of them denser and half sparser at
            random.
        exchanges: The most that are tried together.
        tokens: That a single move is measured on, and that exchanges are compared with the parent on.
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
        """Count the single moves and the comparison of exchanges, with the parent in both."""
        single, last = self.tokens
        return (self.candidates + 1) * single + (self.exchanges + 1) * last

    def begin(self, problem: Problem, seed: int) -> State:
        """Begin at the start; there is nothing else to remember."""
        return State.first(problem.start, seed)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Measure single moves, then compare the exchanges that they promise with the parent."""
        rng, parent = state.generator(), state.parent
        if not any(exchange(problem, parent, 1, rng) not in (None, parent) for _ in range(ATTEMPTS)):
            return replace(state, exhausted=True), []
        race = Measured(problem, state.generation)
        some = draw(self.tokens[0], problem, rng)
        children = self._measured_moves(problem, parent, race, some, rng)
        last = draw(self.tokens[1], problem, rng) if children else some  # there, what the parent does is known
        (best,) = race.step([parent, *children], last, 1)  # the parent first: it wins a tie
        fitness = float(race.losses([best], last).mean())
        return State(best, fitness, state.generation + 1, state.tokens + race.tokens, rng_state(rng)), race.rows

    def _measured_moves(
        self, problem: Problem, parent: Allocation, race: Measured, sequences: np.ndarray, rng: np.random.Generator
    ) -> list[Allocation]:
        """What single moves, once measured, say is worth a comparison."""
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
        """Single moves to be measured, as many denser as sparser ones where they are not all."""
        denser = [(i, DENSER) for i, level in enumerate(parent) if level > 0]
        sparser = [(i, SPARSER) for i, unit in enumerate(problem.space.units) if parent[i] + 1 < len(unit.levels)]
        half = max(self.candidates // 2, self.candidates - len(sparser))
        chosen = [denser[i] for i in np.sort(rng.permutation(len(denser))[:half])]
        rest = self.candidates - len(chosen)
        return chosen + [sparser[i] for i in np.sort(rng.permutation(len(sparser))[:rest])]


def effects_of(fitness: np.ndarray) -> list[float]:
    """By how much each move changes the fitness of the parent, which comes first in (1 + moves,) fitnesses.

    A move from a finite parent to what is not finite is infinitely bad. From a parent that is not finite itself, a move
    to what is finite is a gain, and the others say nothing.
    """
    if np.isfinite(fitness[0]):
        return [float(effect) for effect in fitness[1:] - fitness[0]]
    finite = fitness[np.isfinite(fitness)]
    above = float(finite.max()) + 1.0 if len(finite) else 0.0
    return [float(one) - above if np.isfinite(one) else 0.0 for one in fitness[1:]]


def best_exchanges(problem: Problem, parent: Allocation, effects: Effects, count: int) -> Iterator[Allocation]:
    """The parent after the most promising exchange, after that and one of other units, ...; none that promises
    a loss.
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
    """An exchange that begins with a move: the sum of the effects, and where it leads; None where the budget cannot be
    met.

    A unit may move by several levels, each of them taken to have the effect of the first.
    """
    budget, costs = problem.budget, problem.budget.leading.costs
    levels = list(_moved(at, [first]))
    change = effects[first]

    def take(moves: list[Move]) -> float | None:
        """Make the move of least effect for what it frees, or of most gain for what it takes."""
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
