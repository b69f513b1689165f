"""Searches a whole front of loss against cost in one run, so that later any budget needs no search (our own strategy).

The points of the front are budgets, spread evenly from the run's own to the dense model. A generation of guided search
(`search.strategies.guided.search`) works at one point; the generations go from the densest point to the sparsest, and
again. A prediction holds for any budget nearby, so offspring are made for the point and for its neighbours, and race
against the allocation that the point of their budget has. The allocations of neighbours, repaired to the budget, race
with them. The last generation measures all points on the same sequences.
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
        target: The target of the budget's first limit.
        start: The uniform allocation of this budget. If no allocation comes within a step of the budget, others need
            only come as near to it as this one.
        allocation: The best allocation so far.
        damping: The damping around which those of the next generation here lie.
        fitness: The allocation's fitness when it was last measured; None if it has not been measured yet.
        tokens: How many tokens that measurement took.
        visits: How many generations have worked at this budget.
        pairs: The pairs of allocations that the proposal learns from.
        known: The losses of the allocation by sequence.
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
        """Return the search that a state wrote."""
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
        """Return this search with another allocation, and with what the measurements on these sequences say of it."""
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
        searches: How far the search has come with each budget, from the run's own to the densest.
    """

    searches: tuple[BudgetSearch, ...] = ()

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the searches of the budgets."""
        return super().values_of(content) | {"searches": tuple(map(BudgetSearch.from_json, content["searches"]))}

    def allocations(self) -> list[Allocation]:
        """Add the allocations in the searches of the budgets."""
        found = [self.parent]
        for search in self.searches:
            found += [search.start, search.allocation]
            found += [one for pair in search.pairs for one in (pair.first, pair.second)]
        return found


@dataclass(frozen=True)
class Pareto(GuidedSettings):
    """Settings of the search for a front: those of a guided search, whose generations all points share.

    Attributes:
        points: How many budgets are searched, from the run's own evenly up to the dense model, which is not one.
    """

    name: ClassVar[str] = "pareto"
    state_class: ClassVar[type[State]] = FrontState

    points: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("points", self.points, 1)

    @property
    def tokens_per_generation(self) -> int:
        """Add the races at both neighbours, and a generation's share of the last measurement of all points."""
        more = 0 if self.points == 1 else 2 * (LEADER + 2 * self.growth)
        last = self.points * self.growth * self.tokens // max(1, self.generations)
        return super().tokens_per_generation + self.tokens * more + last

    def check_rounds(self, rounds: int) -> None:
        """Refuse more than one round, as the levels of a second one would suit only one point of the front."""
        if rounds != 1:
            raise InputError(f"rounds={rounds} with strategy=pareto: a front is of one set of levels; use rounds=1")

    def front(self, state: FrontState) -> Sequence[FrontPoint] | None:
        """Return the points of the front as the last generation left them."""
        return [FrontPoint(one.target, one.allocation, one.fitness, one.tokens) for one in state.searches]

    def begin(self, problem: Problem, seed: int) -> FrontState:
        """Return a state with the uniform allocation at each budget."""
        searches = []
        for index, budget in enumerate(budgets_of(problem.budget, self.points)):
            start = problem.start if index == 0 else uniform(problem.space, budget)
            searches.append(BudgetSearch(budget.first.target, start, start, PROPOSALS[self.proposal].damping))
        return replace(FrontState.first(problem.start, seed), searches=tuple(searches))

    def advance(self, problem: Problem, state: FrontState) -> tuple[FrontState, list[HistoryRow]]:
        """Work at one point and race at its neighbours; in the last generation, measure all points alike."""
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
        """Return the index of the point that a generation works at: from the densest to the sparsest, and again.

        If there are fewer generations than points, they are spread evenly over the front.
        """
        if self.generations < self.points:
            return (self.generations - 1 - generation) * self.points // self.generations
        return self.points - 1 - generation % self.points


@dataclass
class _Generation:
    """One generation at work on the front, whose list of searches it changes in place."""

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
        """Predict at a point, then race for it and for its neighbours; return whether there was anything to race."""
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
        """Add to a point's offspring the allocations of other points, repaired to its budget, with their dampings."""
        repaired = [closest(self.front[index].allocation, self.problems[at].budget) for index in others]
        found = dict(offspring) | {child: self.front[at].damping for child in repaired if child not in offspring}
        own = self.front[at].allocation
        return {child: damping for child, damping in found.items() if child != own and self.problems[at].allows(child)}

    def _race(self, at: int, offspring: Mapping[Allocation, float], order: Sequence[int]) -> Outcome | None:
        """Race at a point against the allocation that it has; return None if there is no offspring to race."""
        if not offspring:
            return None
        point, tokens = self.front[at], self.settings.tokens
        enough, most = (sequences_for(count, self.problem) for count in (tokens, tokens * self.settings.growth))
        outcome = race(self.measured, point.allocation, list(offspring), order, enough, most, self.settings.errors)
        best = outcome.leader if outcome.clear else point.allocation
        self.front[at] = point.measured_on(self.measured, best, outcome.sequences)
        return outcome

    def settle(self) -> None:
        """Measure all points on the same sequences; a point that a cheaper one beats takes over its allocation."""
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
    """Return budgets spread evenly from this one, which comes first, towards the dense model, which is left out.

    All limits of a budget are moved by the same share of the way to the dense model.
    """
    return [
        Budget(
            tuple(replace(one, target=one.target + (one.dense - one.target) * index // points) for one in budget.limits)
        )
        for index in range(points)
    ]
