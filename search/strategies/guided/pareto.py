"""A front of loss against cost in one run, from which any budget is taken later without a search (ours).

The points of the front are budgets, evenly from the run's own to the dense model. A generation of guided search
(`search.strategies.guided.search`) works at one of them, from the densest to the sparsest and again. What it predicts
there for every level of every unit holds for any budget near by, so offspring are made for the point and for its
neighbours; they race against what the point of their budget has, on the same sequences. What a point has is tried at
its neighbours, too, repaired to their budgets. In the end all points are measured on the same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from search.budgets.budget import Budget
from search.budgets.knapsack import closest, uniform
from search.strategies.base import FrontPoint, HistoryRow, Problem
from search.strategies.checks import check_whole
from search.strategies.guided.proposals import PROPOSALS, Pairs
from search.strategies.guided.race import Outcome, race
from search.strategies.guided.search import LEADER, GuidedSettings, next_damping
from search.strategies.measuring import Measured, Pair, sequences_for
from search.strategies.state import State, read_allocation, read_count, read_losses, read_number, rng_state
from supernet.errors import InputError
from supernet.space import Allocation


@dataclass(frozen=True)
class BudgetSearch:
    """How far the search has come with one budget of the front.

    Attributes:
        target: Of the budget's first limit.
        start: The uniform allocation; where none comes within a step of the budget, one that comes as near will do.
        allocation: The best so far.
        damping: Around which the next dampings here lie.
        fitness: Its fitness where it was last measured; None before that.
        tokens: How many it was measured on there.
        visits: Generations that worked here.
        pairs: What the proposal learns from.
        known: Losses of the allocation by sequence.
    """

    target: int
    start: Allocation
    allocation: Allocation
    damping: float
    fitness: float | None = None
    tokens: int = 0
    visits: int = 0
    pairs: Pairs = ()
    known: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> BudgetSearch:
        """Return what a state wrote."""
        fitness = content["fitness"]
        return BudgetSearch(
            read_count(content["target"]),
            read_allocation(content["start"]),
            read_allocation(content["allocation"]),
            read_number(content["damping"]),
            None if fitness is None else read_number(fitness),
            read_count(content["tokens"]),
            read_count(content["visits"]),
            tuple(map(Pair.from_json, content["pairs"])),
            read_losses(content["known"]),
        )

    def measured_on(self, measured: Measured, allocation: Allocation, sequences: Sequence[int]) -> BudgetSearch:
        """Return the same budget with this allocation and what is known of it."""
        return replace(
            self,
            allocation=allocation,
            fitness=float(measured.losses([allocation], sequences).mean()),
            tokens=len(sequences) * measured.problem.evaluate.sequence_length,
            known=measured.known(allocation),
        )


@dataclass(frozen=True)
class FrontState(State):
    """Where the search for a front stands; the parent is the allocation of the run's own budget.

    Attributes:
        searches: Those of all budgets, from the run's own to the densest.
    """

    searches: tuple[BudgetSearch, ...] = ()

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add those of the budgets."""
        return super().values_of(content) | {"searches": tuple(map(BudgetSearch.from_json, content["searches"]))}

    def allocations(self) -> list[Allocation]:
        """Add those of the budgets."""
        found = [self.parent]
        for search in self.searches:
            found += [search.start, search.allocation]
            found += [one for pair in search.pairs for one in (pair.first, pair.second)]
        return found


@dataclass(frozen=True)
class Pareto(GuidedSettings):
    """Settings of the search: those of a guided one, whose generations are those of all points together.

    Attributes:
        points: Budgets, evenly from the run's own to the dense model, which is no point of its own.
    """

    name: ClassVar[str] = "pareto"
    state_class: ClassVar[type[State]] = FrontState

    points: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("points", self.points, 1)

    @property
    def tokens_per_generation(self) -> int:
        """Add the races at both neighbours, and the last generation's measurement of all points."""
        more = 0 if self.points == 1 else 2 * (LEADER + 2 * self.growth)
        last = self.points * self.growth * self.tokens // max(1, self.generations)
        return super().tokens_per_generation + self.tokens * more + last

    def check_rounds(self, rounds: int) -> None:
        """Refuse more than one round: the levels of a second one would be made for one point of the front."""
        if rounds != 1:
            raise InputError(f"rounds={rounds} with strategy=pareto: a front is of one set of levels; use rounds=1")

    def front(self, state: FrontState) -> Sequence[FrontPoint] | None:
        """Return the points as the last generation left them."""
        return [FrontPoint(one.target, one.allocation, one.fitness, one.tokens) for one in state.searches]

    def begin(self, problem: Problem, seed: int) -> FrontState:
        """Begin at the uniform allocation of each budget."""
        searches = []
        for index, budget in enumerate(budgets_of(problem.budget, self.points)):
            start = problem.start if index == 0 else uniform(problem.space, budget)
            searches.append(BudgetSearch(budget.first.target, start, start, PROPOSALS[self.proposal].damping))
        return replace(FrontState.first(problem.start, seed), searches=tuple(searches))

    def advance(self, problem: Problem, state: FrontState) -> tuple[FrontState, list[HistoryRow]]:
        """Work at one point and race at its neighbours; the last generation measures all points alike."""
        rng = state.generator()
        order = [int(sequence) for sequence in rng.permutation(problem.evaluate.sequences)]
        front = list(state.searches)
        known: dict[Allocation, dict[int, float]] = {}
        for point in front:  # two points may have the same allocation
            known.setdefault(point.allocation, {}).update(point.known)
        work = _Generation(self, problem, front, Measured(problem, state.generation, known), order, rng)
        first = self._point_of(state.generation)
        exhausted = not any(work.visit((first - step) % self.points) for step in range(self.points))
        if exhausted or state.generation + 1 >= self.generations:
            work.settle()
        after = FrontState(
            front[0].allocation,
            front[0].fitness,
            state.generation + 1,
            state.tokens + work.measured.tokens,
            rng_state(rng),
            exhausted,
            tuple(front),
        )
        return after, work.measured.rows

    def _point_of(self, generation: int) -> int:
        """Where a generation works: from the densest point to the sparsest, and again; too few for that are spread
        evenly.
        """
        if self.generations < self.points:
            return (self.generations - 1 - generation) * self.points // self.generations
        return self.points - 1 - generation % self.points


@dataclass
class _Generation:
    """One generation's work on the front, which is changed in place."""

    settings: Pareto
    problem: Problem
    front: list[BudgetSearch]
    measured: Measured
    order: list[int]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        budgets = budgets_of(self.problem.budget, self.settings.points)
        self.problems = [
            replace(self.problem, budget=budget, start=point.start)
            for budget, point in zip(budgets, self.front, strict=True)
        ]

    def visit(self, at: int) -> bool:
        """Predict at a point, then race for it and for its neighbours; whether there was anything to race."""
        seen = sequences_for(self.settings.predicted_on, self.problem)
        unseen = self.order[seen:] + self.order[:seen]  # what the prediction was not made on comes first
        beside = [index for index in (at - 1, at + 1) if 0 <= index < len(self.front)]
        here = self.front[at]
        source = here.allocation, here.damping, here.visits
        proposal, problem = PROPOSALS[self.settings.proposal], self.problems[at]
        predictions, pairs = proposal.predict(
            problem, self.measured, here.allocation, here.pairs, self.order[:seen], self.rng
        )
        self.front[at] = replace(here, pairs=pairs, visits=here.visits + 1)
        offspring = self.settings.propose(problem, *source, predictions, self.rng)
        offspring = self._with_repaired(at, offspring, beside)
        outcome = self._race(at, offspring, unseen)
        if outcome is not None:
            damping = next_damping(here.damping, outcome, offspring[outcome.leader])
            pairs = proposal.learn(pairs, self.measured, here.allocation, list(offspring))
            self.front[at] = replace(self.front[at], damping=damping, pairs=pairs)
        raced = [outcome]
        few = replace(self.settings, offspring=max(1, self.settings.offspring // 2))
        for index in beside:
            offspring = few.propose(self.problems[index], *source, predictions, self.rng)
            raced.append(self._race(index, self._with_repaired(index, offspring, [at]), unseen))
        return any(one is not None for one in raced)

    def _with_repaired(
        self, at: int, offspring: Mapping[Allocation, float], others: Sequence[int]
    ) -> dict[Allocation, float]:
        """What may be raced at a point: its offspring, and what other points have, repaired to its budget."""
        repaired = [closest(self.front[index].allocation, self.problems[at].budget) for index in others]
        found = dict(offspring) | {child: self.front[at].damping for child in repaired if child not in offspring}
        own = self.front[at].allocation
        return {child: damping for child, damping in found.items() if child != own and self.problems[at].allows(child)}

    def _race(self, at: int, offspring: Mapping[Allocation, float], order: Sequence[int]) -> Outcome | None:
        """Race for a point; None where nothing challenges what it has."""
        if not offspring:
            return None
        point, tokens = self.front[at], self.settings.tokens
        enough, most = (sequences_for(count, self.problem) for count in (tokens, tokens * self.settings.growth))
        outcome = race(self.measured, point.allocation, list(offspring), order, enough, most, self.settings.errors)
        best = outcome.leader if outcome.clear else point.allocation
        self.front[at] = point.measured_on(self.measured, best, outcome.sequences)
        return outcome

    def settle(self) -> None:
        """Measure all points on the same sequences; one that a cheaper one beats takes that one's allocation."""
        sequences = self.order[: sequences_for(self.settings.tokens * self.settings.growth, self.problem)]
        allocations = list(dict.fromkeys(point.allocation for point in self.front))
        self.measured.step(allocations, sequences, len(allocations))
        best = self.front[0].allocation, math.inf
        for index, point in enumerate(self.front):
            fitness = float(self.measured.losses([point.allocation], sequences).mean())
            if fitness <= best[1]:
                best = point.allocation, fitness
            self.front[index] = point.measured_on(self.measured, best[0], sequences)


def budgets_of(budget: Budget, points: int) -> list[Budget]:
    """Evenly from this budget, which comes first, to the dense model, which is left out; each limit as much as the
    others.
    """
    return [
        Budget(
            tuple(replace(one, target=one.target + (one.dense - one.target) * index // points) for one in budget.limits)
        )
        for index in range(points)
    ]
