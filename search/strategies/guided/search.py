"""Search whose proposals know where to go (ours).

For every level of every unit a proposal predicts what it would change (`search.strategies.guided.proposals`). To first
order every change looks better than it is: taken by the prediction alone, all units would move at once and the loss
would multiply. So a change has a price, quadratic in how far it goes and in proportion to what the unit has at stake,

    minimise  sum_u  g_u(l_u) + damping * stake_u * distance_u(l_u)^2     within the budget,

which the knapsack solves in milliseconds: a small damping moves everything, a large one a few units a little. Offspring
are the solutions at dampings around the one that won last, some with the prices of units drawn at random. They race
against the parent on the same tokens (`search.strategies.guided.race`), and the parent is left only for what is clearly
better. So the size of the steps follows how well predictions hold, and when gains shrink, more tokens are spent to see
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from search.budgets.knapsack import relaxed
from search.strategies.base import FEWEST, HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_whole
from search.strategies.evolution.base import ATTEMPTS, exchange
from search.strategies.guided.proposals import PROPOSALS, Pairs, Prediction
from search.strategies.guided.race import Outcome, race
from search.strategies.measuring import Measured, Pair, sequences_for
from search.strategies.state import State, read_losses, read_number, rng_state
from supernet.errors import InputError
from supernet.space import Allocation

RATIO = 2.0  # between neighbouring dampings of a generation
LEAST = 0.05  # sparsity that distances are measured by
DENSER = 0.2  # price of going denser, of that of going sparser
SPREAD = 0.7  # of the logarithm of a unit's price, in those offspring whose prices are drawn
EXCHANGES = 3  # at most, of a blind offspring
HIGHEST, LOWEST = 1e4, 1e-2  # dampings
# Times `tokens` that finding the leader of a race costs, about; judging it costs `growth` times, and so does its
# parent.
LEADER = 4


@dataclass(frozen=True)
class GuidedState(State):
    """Where a guided search stands.

    Attributes:
        damping: Around which the next generation's dampings lie.
        pairs: What the proposal learns from.
        known: Losses of the parent by sequence, which the next generation need not measure again.
    """

    damping: float = 0.0
    pairs: Pairs = ()
    known: dict[int, float] = field(default_factory=dict)

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add those of the proposal and of the parent."""
        return super().values_of(content) | {
            "damping": read_number(content["damping"]),
            "pairs": tuple(map(Pair.from_json, content["pairs"])),
            "known": read_losses(content["known"]),
        }

    def allocations(self) -> list[Allocation]:
        """Add those of the pairs."""
        return [self.parent, *(one for pair in self.pairs for one in (pair.first, pair.second))]


@dataclass(frozen=True)
class GuidedSettings(StrategyDefaults):
    """Settings of a guided search, and how it makes offspring.

    Attributes:
        generations: How many.
        offspring: Allocations proposed a generation.
        proposal: `gradient`, or `forward` for those who can run forward passes only.
        proposal_tokens: Tokens that a generation's prediction is made on; None for what the proposal takes by itself.
        tokens: Tokens that the best offspring is found on at most.
        growth: How many times as many it is judged on at most.
        errors: Standard errors by which an offspring must be better; half as many on all that it may be judged on.
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
        """Tokens that a generation's prediction is made on."""
        return PROPOSALS[self.proposal].tokens if self.proposal_tokens is None else self.proposal_tokens

    @property
    def tokens_per_generation(self) -> int:
        """Count the prediction and a whole race; less is spent where races end early or the pool has less."""
        return PROPOSALS[self.proposal].cost * self.predicted_on + self.tokens * (LEADER + 2 * self.growth)

    def judged_on(self, pool: int, length: int) -> int:
        """Sequences that the leader of a race is judged on at most, of a pool of sequences of a length."""
        return min(-(-self.tokens * self.growth // length), pool - 1)  # it has been found on one of them at least

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn, too, of a text and settings with which no offspring could ever be taken."""
        if self.judged_on(sequences, length) >= 2:
            return super().pool_warning(sequences, length)
        more, tokens = max(FEWEST, sequences), max(self.tokens, 2 * length)
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
        """Return distinct allocations, none like the parent, each with its damping.

        Args:
            problem: Whose budget they meet.
            parent: The allocation that the predictions start from.
            damping: Around which the dampings of the offspring lie.
            turn: Generations that this budget has had before; in the first one the plain knapsack is tried, too.
            predictions: They take turns in making an offspring.
            rng: Draws the prices of some offspring.
        """
        found: dict[Allocation, float] = {}
        if turn == 0:
            _add(found, problem, parent, relaxed(predictions[0], problem.budget), LOWEST)
        priced = [(changes, prices_of(problem, parent, changes)) for changes in predictions]
        for attempt in range(4 * self.offspring):
            if len(found) >= self.offspring:
                break
            own = damping * RATIO ** (attempt % self.offspring - self.offspring / 2)
            # also where unused: each attempt draws as much
            drawn = np.exp(SPREAD * rng.standard_normal(len(parent)))
            factors = drawn if attempt % 2 or attempt >= self.offspring else np.ones(len(parent))
            changes, prices = priced[(3 * attempt + turn) % len(priced)]  # each meets all dampings in time
            losses = [g + own * factor * price for g, price, factor in zip(changes, prices, factors, strict=True)]
            _add(found, problem, parent, relaxed(losses, problem.budget), own)
        for _ in range(ATTEMPTS * self.offspring):  # where predictions give too little, blind exchanges
            if len(found) >= self.offspring:
                break
            child = exchange(problem, parent, int(rng.integers(1, EXCHANGES + 1)), rng)
            if child is not None:
                _add(found, problem, parent, child, damping)
        return found


@dataclass(frozen=True)
class Guided(GuidedSettings):
    """Guided search for the allocation of one budget."""

    name: ClassVar[str] = "guided"
    state_class: ClassVar[type[State]] = GuidedState

    def begin(self, problem: Problem, seed: int) -> GuidedState:
        """Begin with the proposal's own damping."""
        return replace(GuidedState.first(problem.start, seed), damping=PROPOSALS[self.proposal].damping)

    def advance(self, problem: Problem, state: GuidedState) -> tuple[GuidedState, list[HistoryRow]]:
        """Predict at the parent, make offspring and race them against it."""
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
    """Where the next generation's dampings lie: towards that of the best offspring, or higher where all of them
    lost.
    """
    after = (before * winning) ** 0.5 if outcome.gain > 0 else before * RATIO
    return float(np.clip(after, LOWEST, HIGHEST))


def _add(
    found: dict[Allocation, float], problem: Problem, parent: Allocation, child: Allocation, damping: float
) -> None:
    if child != parent and problem.allows(child):
        found.setdefault(child, damping)


def prices_of(problem: Problem, parent: Allocation, changes: Prediction) -> list[np.ndarray]:
    """For each unit and level the price of going there at a damping of 1: what is at stake, by the squared distance in
    costs.

    At stake is the largest predicted change; the distance is 1 from the uniform allocation's level to the dense one.
    Going denser is cheaper: what was removed comes back at most once, while the loss of going sparser has no bound.
    """
    found, share = [], max(LEAST, 1.0 - problem.budget.leading.target / max(1, problem.budget.leading.dense))
    for costs, level, change in zip(problem.budget.leading.costs, parent, changes, strict=True):
        distances = np.array(costs, dtype=float) - costs[level]
        scale = share * max(1, costs[0])
        sides = np.where(distances > 0, DENSER, 1.0)
        found.append(float(np.abs(change).max()) * sides * (distances / scale) ** 2)
    return found
