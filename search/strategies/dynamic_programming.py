"""Scores every unit by itself and lets a knapsack choose among them, as Puzzletron (NVIDIA) does with blocks.

The fitness is measured with one unit at another level and all others at a reference, for a few levels of every unit and
on the same sequences. Between these levels it is interpolated so that it never falls as the unit gets sparser. What it
exceeds the reference's fitness by is assumed to add up over units, so that a knapsack finds the best allocation. This
allocation is compared with the start, which stays unless it is beaten.

SPDY (Frantar and Alistarh 2022) solves such a knapsack, too, but its point is a search over the coefficients of the
scores, which is not done here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from search.budgets.knapsack import knapsack
from search.strategies.base import HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_choice, check_tokens, check_whole
from search.strategies.evolution.base import draw
from search.strategies.measuring import Measured
from search.strategies.state import State, read_count, read_number, rng_state
from supernet.errors import InputError
from supernet.space import Allocation

log = logging.getLogger(__name__)

REFERENCES = ("dense", "start")
Probe = tuple[int, int]  # a unit, and a level at which it is measured


@dataclass(frozen=True)
class ScoredState(State):
    """The scores that have been measured so far; each generation adds a portion.

    Attributes:
        sequences: Which sequences of the search text all scores are measured on.
        start_losses: The loss of the start on each of these sequences.
        scores: The mean losses so far: first that of the reference, then those of the probes in their order.
    """

    sequences: tuple[int, ...] = ()
    start_losses: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields that hold the scores."""
        return super().values_of(content) | {
            "sequences": tuple(map(read_count, content["sequences"])),
            "start_losses": tuple(map(read_number, content["start_losses"])),
            "scores": tuple(map(read_number, content["scores"])),
        }


@dataclass(frozen=True)
class DynamicProgramming(StrategyDefaults):
    """Settings of the search by independent scores.

    Attributes:
        generations: How many generations a round has at most. Each of them scores a portion of the probes; the last one
            compares the result with the start.
        candidates: How many allocations a generation scores; more, if the generations would otherwise not suffice for
            one level of every unit.
        points: How many levels of every unit are measured, evenly spread; fewer, if the generations do not suffice.
        tokens: Two numbers: how many tokens a score is measured on, and how many the comparison with the start takes.
        reference: Where all other units are while one is measured: `dense`, or at the level of the `start`.
    """

    name: ClassVar[str] = "dynamic_programming"
    state_class: ClassVar[type[State]] = ScoredState

    generations: int
    candidates: int
    points: int
    tokens: Sequence[int]
    reference: str = "dense"

    def __post_init__(self) -> None:
        check_whole("generations", self.generations, 2)
        check_whole("candidates", self.candidates, 1)
        check_whole("points", self.points, 1)
        check_tokens(self.tokens, "a score", "the comparison with the start")
        check_choice("reference", self.reference, REFERENCES)

    @property
    def tokens_per_generation(self) -> int:
        """Count a portion of scores, or the comparison with the start if that takes more."""
        return max(self.candidates * self.tokens[0], 2 * self.tokens[1])

    def begin(self, problem: Problem, seed: int) -> ScoredState:
        """Return a state without any scores."""
        return ScoredState.first(problem.start, seed)

    def advance(self, problem: Problem, state: ScoredState) -> tuple[ScoredState, list[HistoryRow]]:
        """Score a portion of the probes or, once all are scored, solve the knapsack and compare with the start."""
        rng = state.generator()
        probes = self._probes(problem, warn=not state.scores)
        if not state.scores and not _has_choice(problem):
            return replace(state, exhausted=True), []
        sequences = state.sequences or tuple(draw(self.tokens[0], problem, rng).tolist())
        known = {problem.start: dict(zip(sequences, state.start_losses, strict=False))}
        race = Measured(problem, state.generation, known)
        done = len(state.scores)
        if done == 1 + len(probes):
            return self._finish(problem, state, race, probes, rng)
        begun = time.perf_counter()
        size = max(self.candidates, -(-(1 + len(probes)) // (self.generations - 1)))
        portion = self._allocations(problem, probes)[done : done + size]
        fitness = race.losses(portion, sequences).mean(1)
        race.note(portion, fitness, len(sequences), set(), time.perf_counter() - begun)
        race.step([problem.start], sequences, 1)
        start = race.losses([problem.start], sequences)[0]
        state = replace(
            state,
            parent=problem.start,
            fitness=float(start.mean()),
            generation=state.generation + 1,
            tokens=state.tokens + race.tokens,
            rng=rng_state(rng),
            sequences=sequences,
            start_losses=tuple(start.tolist()),
            scores=(*state.scores, *fitness.tolist()),
        )
        return state, race.rows

    def _finish(
        self, problem: Problem, state: ScoredState, race: Measured, probes: Sequence[Probe], rng: np.random.Generator
    ) -> tuple[ScoredState, list[HistoryRow]]:
        """Solve the knapsack, and keep what it finds if that beats the start."""
        best = knapsack(self._losses(problem, probes, state.scores), problem.budget)
        rivals = [best] if best != problem.start and problem.allows(best) else []
        last = draw(self.tokens[1], problem, rng)
        (best,) = race.step([problem.start, *rivals], last, 1)  # the start first: it wins a tie
        generation = state.generation + 1
        state = replace(
            state,
            parent=best,
            fitness=float(race.losses([best], last).mean()),
            generation=generation,
            tokens=state.tokens + race.tokens,
            rng=rng_state(rng),
            exhausted=generation < self.generations,  # the generations that are left have nothing to do
        )
        return state, race.rows

    def _reference(self, problem: Problem) -> Allocation:
        return problem.start if self.reference == "start" else (0,) * len(problem.start)

    def _probes(self, problem: Problem, warn: bool) -> list[Probe]:
        """Choose which levels of which units are measured, besides the reference: up to `points` of each unit."""
        room = (self.generations - 1) * self.candidates - 1
        for points in range(self.points, 0, -1):
            probes = [
                (unit, level)
                for unit, base in enumerate(self._reference(problem))
                for level in _spread(len(problem.space.units[unit].levels), points)
                if level != base
            ]
            if len(probes) <= room:
                break
        if warn and (points < self.points or len(probes) > room):
            log.warning(
                "strategy.points: %d levels of each unit are measured; raise strategy.generations for more", points
            )
        return probes

    def _allocations(self, problem: Problem, probes: Sequence[Probe]) -> list[Allocation]:
        """Return the reference, and after it one allocation for each probe: the reference with one unit changed."""
        base = self._reference(problem)
        return [base, *((*base[:unit], level, *base[unit + 1 :]) for unit, level in probes)]

    def _losses(self, problem: Problem, probes: Sequence[Probe], scores: Sequence[float]) -> list[np.ndarray]:
        """Return what each level adds to the reference's fitness, (levels,) for each unit."""
        base = self._reference(problem)
        points = [{level: 0.0} for level in base]
        finite = [score for score in scores if np.isfinite(score)]
        if not np.isfinite(scores[0]):
            instead = (
                "use strategy.reference=dense, or dtype=float32" if self.reference == "start" else "use dtype=float32"
            )
            raise InputError(
                f"scores are measured from the {self.reference} allocation, whose loss is not finite; {instead}"
            )
        # A probe whose loss is not finite counts as worse than all those whose loss is.
        worst = scores[0] + 10.0 * (max(finite) - min(finite)) + 1.0
        for (index, level), score in zip(probes, scores[1:], strict=True):
            points[index][level] = (score if np.isfinite(score) else worst) - scores[0]
        losses = []
        for unit, known in zip(problem.space.units, points, strict=True):
            measured = sorted(known)
            removed = [-level.cost for level in unit.levels]
            rising = np.maximum.accumulate([known[level] for level in measured])
            losses.append(np.interp(removed, [removed[level] for level in measured], rising))
        return losses


def _spread(levels: int, points: int) -> list[int]:
    """Return the first and the last level and levels evenly between them, which make `points` intervals."""
    return sorted({round(level) for level in np.linspace(0, levels - 1, points + 1)})


def _has_choice(problem: Problem) -> bool:
    """Return whether the budget allows anything but the start: the knapsack looks for what differs from it most."""
    losses = []
    for unit, level in zip(problem.space.units, problem.start, strict=True):
        losses.append(np.zeros(len(unit.levels)))
        losses[-1][level] = 1.0
    other = knapsack(losses, problem.budget)
    return other != problem.start and problem.allows(other)
