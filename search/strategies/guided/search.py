"""Guided search, the project's own strategy: predictions say where to go, and measurements check how far.

A proposal predicts what every level of every unit would change (`search.strategies.guided.proposals`). To first order
every change looks better than it is: by the prediction alone all units would move at once, and the loss would multiply.
So a change has a price, which is quadratic in how far it goes and in proportion to what the unit has at stake:

    minimise  sum_u  g_u(l_u) + damping * stake_u * distance_u(l_u)^2     within the budget,

The knapsack solves this in milliseconds. A small damping moves everything, a large one moves a few units a little.
Offspring are the solutions at dampings around the one that won last, some of them with prices drawn at random. They
race against the parent on the same tokens (`search.strategies.guided.race`), and replace it only if they are clearly
better. In this way the size of the steps follows how well predictions hold, and small gains get more tokens to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from search.budgets.knapsack import relaxed
from search.strategies.base import FEWEST_SEQUENCES, HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_whole
from search.strategies.evolution.base import ATTEMPTS, exchange
from search.strategies.guided.proposals import PROPOSALS, Pairs, Prediction
from search.strategies.guided.race import Outcome, race
from search.strategies.measuring import Measured, Pair, sequences_for
from search.strategies.state import State, read_losses, read_number, rng_state
from supernet.errors import InputError
from supernet.space import Allocation

RATIO = 2.0  # ratio of neighbouring dampings in a generation
LEAST = 0.05  # the smallest sparsity that distances are measured in, for budgets near the dense model
DENSER = 0.2  # price of going denser, relative to that of going sparser
SPREAD = 0.7  # standard deviation of the logarithm of a unit's price, where prices are drawn at random
EXCHANGES = 3  # made at most by an offspring that no prediction guides
HIGHEST, LOWEST = 1e4, 1e-2  # limits of the damping
# Finding the leader of a race costs about this many times `tokens`. Judging it costs `growth` times as many, and
# measuring the parent on the same sequences costs that again.
LEADER = 4


@dataclass(frozen=True)
class GuidedState(State):
    """Where a guided search stands.

    Attributes:
        damping: The damping around which those of the next generation lie.
        pairs: The pairs of allocations that the proposal learns from.
        known: The losses of the parent by sequence, which the next generation need not measure again.
    """

    damping: float = 0.0
    pairs: Pairs = ()
    known: dict[int, float] = field(default_factory=dict)

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields that a guided search has besides."""
        return super().values_of(content) | {
            "damping": read_number(content["damping"]),
            "pairs": tuple(map(Pair.from_json, content["pairs"])),
            "known": read_losses(content["known"]),
        }

    def allocations(self) -> list[Allocation]:
        """Add the allocations of the pairs."""
        return [self.parent, *(one for pair in self.pairs for one in (pair.first, pair.second))]


@dataclass(frozen=True)
class GuidedSettings(StrategyDefaults):
    """Settings of a guided search, and how it makes offspring.

    Attributes:
        generations: How many generations a round has.
        offspring: How many allocations a generation proposes.
        proposal: How predictions are made: `gradient`, or `forward` if only forward passes are possible.
        proposal_tokens: How many tokens a generation's prediction is made on; None takes what the proposal suggests.
        tokens: How many tokens the best offspring is found on at most.
        growth: How many times as many tokens it is then judged on at most.
        errors: By how many standard errors an offspring must beat the parent; half as many once it has been judged on
            all the tokens it may be.
    """

    generations: int = 10
    offspring: int = 8
    proposal: str = "gradient"
    proposal_tokens: int | None = None
    tokens: int = 4096
    growth: int = 4
    errors: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("generations", 0), ("offspring", 1), ("tokens", 1), ("growth", 1)):
            check_whole(name, getattr(self, name), least)
        if self.proposal_tokens is not None:
            check_whole("proposal_tokens", self.proposal_tokens, 1)
        if self.proposal not in PROPOSALS:
            raise InputError(f"strategy.proposal={self.proposal} is not known; choose one of {', '.join(PROPOSALS)}")
        if type(self.errors) not in (int, float) or not 0 <= self.errors < 100:
            raise InputError(
                f"strategy.errors={self.errors} must be a number of standard errors of at least 0, such as 2"
            )

    @property
    def predicted_on(self) -> int:
        """How many tokens a generation's prediction is made on."""
        return PROPOSALS[self.proposal].tokens if self.proposal_tokens is None else self.proposal_tokens

    @property
    def tokens_per_generation(self) -> int:
        """Count the prediction and a whole race; less is spent where races end early or the pool has less."""
        return PROPOSALS[self.proposal].cost * self.predicted_on + self.tokens * (LEADER + 2 * self.growth)

    def judged_on(self, pool: int, length: int) -> int:
        """Return how many sequences of a pool the leader of a race is judged on at most.

        Args:
            pool: How many sequences the pool has.
            length: How many tokens each sequence has.
        """
        return min(-(-self.tokens * self.growth // length), pool - 1)  # it has been found on one of them at least

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn also of text and settings with which no offspring could ever replace the parent."""
        if self.judged_on(sequences, length) >= 2:
            return super().pool_warning(sequences, length)
        more, tokens = max(FEWEST_SEQUENCES, sequences), max(self.tokens, 2 * length)
        return (
            "offspring are judged on a single sequence, which proves nothing, so none will be taken: use "
            f"data.sequences.search={more} or more, and strategy.tokens={tokens}"
        )

    def propose(
        self,
        problem: Problem,
        parent: Allocation,
        damping: float,
        turn: int,
        predictions: Sequence[Prediction],
        rng: np.random.Generator,
    ) -> dict[Allocation, float]:
        """Return distinct offspring that differ from the parent, each with the damping that made it.

        Args:
            problem: The problem, whose budget they meet.
            parent: The allocation that the predictions start from.
            damping: The damping around which those of the offspring lie.
            turn: How many generations this budget has had before. In the first one, the knapsack without any price is
                tried, too.
            predictions: The predictions, which take turns in making an offspring.
            rng: The random generator that draws the prices of some offspring.
        """
        found: dict[Allocation, float] = {}
        if turn == 0:
            _add(found, problem, parent, relaxed(predictions[0], problem.budget), LOWEST)
        priced = [(changes, prices_of(problem, parent, changes)) for changes in predictions]
        for attempt in range(4 * self.offspring):
            if len(found) >= self.offspring:
                break
            own = damping * RATIO ** (attempt % self.offspring - self.offspring / 2)
            # Drawn even if unused, so that each attempt draws equally much.
            drawn = np.exp(SPREAD * rng.standard_normal(len(parent)))
            factors = drawn if attempt % 2 or attempt >= self.offspring else np.ones(len(parent))
            changes, prices = priced[(3 * attempt + turn) % len(priced)]  # in time each meets every damping
            losses = [g + own * factor * price for g, price, factor in zip(changes, prices, factors, strict=True)]
            _add(found, problem, parent, relaxed(losses, problem.budget), own)
        for _ in range(ATTEMPTS * self.offspring):  # if predictions give too few, exchange blindly
            if len(found) >= self.offspring:
                break
            child = exchange(problem, parent, int(rng.integers(1, EXCHANGES + 1)), rng)
            if child is not None:
                _add(found, problem, parent, child, damping)
        return found


@dataclass(frozen=True)
class Guided(GuidedSettings):
    """The guided search for the allocation of one budget."""

    name: ClassVar[str] = "guided"
    state_class: ClassVar[type[State]] = GuidedState

    def begin(self, problem: Problem, seed: int) -> GuidedState:
        """Return a state at the start, with the damping that the proposal suggests."""
        return replace(GuidedState.first(problem.start, seed), damping=PROPOSALS[self.proposal].damping)

    def advance(self, problem: Problem, state: GuidedState) -> tuple[GuidedState, list[HistoryRow]]:
        """Predict at the parent, make offspring, and race them against it."""
        rng, proposal = state.generator(), PROPOSALS[self.proposal]
        order = [int(sequence) for sequence in rng.permutation(problem.evaluate.sequences)]
        measured = Measured(problem, state.generation, {state.parent: state.known})
        seen = sequences_for(self.predicted_on, problem)
        predictions, pairs = proposal.predict(problem, measured, state.parent, state.pairs, order[:seen], rng)
        offspring = self.propose(problem, state.parent, state.damping, state.generation, predictions, rng)
        if not offspring:
            return replace(state, tokens=state.tokens + measured.tokens, exhausted=True), measured.rows
        unseen = order[seen:] + order[:seen]  # what the prediction was not made on comes first
        enough, most = (sequences_for(tokens, problem) for tokens in (self.tokens, self.tokens * self.growth))
        outcome = race(measured, state.parent, list(offspring), unseen, enough, most, self.errors)
        parent = outcome.leader if outcome.clear else state.parent
        after = GuidedState(
            parent,
            float(measured.losses([parent], outcome.sequences).mean()),
            state.generation + 1,
            state.tokens + measured.tokens,
            rng_state(rng),
            damping=next_damping(state.damping, outcome, offspring[outcome.leader]),
            pairs=proposal.learn(pairs, measured, state.parent, list(offspring)),
            known=measured.known(parent),
        )
        return after, measured.rows


def next_damping(before: float, outcome: Outcome, winning: float) -> float:
    """Return the damping for the next generation: nearer to the best offspring's, or higher if all of them lost.

    Args:
        before: The damping of this generation.
        outcome: How the race ended.
        winning: The damping of the race's leader.
    """
    after = (before * winning) ** 0.5 if outcome.gain > 0 else before * RATIO
    return float(np.clip(after, LOWEST, HIGHEST))


def _add(
    found: dict[Allocation, float], problem: Problem, parent: Allocation, child: Allocation, damping: float
) -> None:
    if child != parent and problem.allows(child):
        found.setdefault(child, damping)


def prices_of(problem: Problem, parent: Allocation, changes: Prediction) -> list[np.ndarray]:
    """Return the price of going to each level at a damping of 1, (levels,) for each unit.

    The price is what the unit has at stake times the squared distance in cost. At stake is the largest predicted
    change; a distance of 1 is that from the budget's sparsity to the dense unit. Going denser is cheaper, as what was
    removed comes back at most once, while the loss of going sparser has no bound.
    """
    found, share = [], max(LEAST, 1.0 - problem.budget.leading.target / max(1, problem.budget.leading.dense))
    for costs, level, change in zip(problem.budget.leading.costs, parent, changes, strict=True):
        distances = np.array(costs, dtype=float) - costs[level]
        scale = share * max(1, costs[0])
        sides = np.where(distances > 0, DENSER, 1.0)
        found.append(float(np.abs(change).max()) * sides * (distances / scale) ** 2)
    return found
