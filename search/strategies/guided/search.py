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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from search.budgets.knapsack import relaxed
from search.strategies.base import FEWEST, Problem, Row, State, StrategyDefaults, first_state, rng_state
from search.strategies.checks import check_whole
from search.strategies.evolution.base import ATTEMPTS, exchange
from search.strategies.guided.proposals import PROPOSALS, Changes
from search.strategies.guided.race import Outcome, race
from search.strategies.measuring import Measured, sequences_for
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
class Guided(StrategyDefaults):
    """Settings of the search.

    Attributes:
        generations: How many.
        offspring: Allocations proposed a generation.
        proposal: `gradient`, or `forward` for those who can run forward passes only.
        proposal_tokens: Tokens that a generation's prediction is made on; None for what the proposal takes by itself.
        tokens: Tokens that the best offspring is found on at most.
        growth: How many times as many it is judged on at most.
        errors: Standard errors by which an offspring must be better; half as many on all that it may be judged on.
    """

    name: ClassVar[str] = "guided"

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
        """See `Strategy`; less where races end early, or the pool has less."""
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

    def begin(self, problem: Problem, seed: int) -> State:
        """See `Strategy`."""
        return first_state(problem, seed, {"damping": PROPOSALS[self.proposal].damping, "known": {}})

    def advance(self, problem: Problem, state: State) -> tuple[State, list[Row]]:
        """See `Strategy`."""
        rng, memory = state.generator(), state.memory
        order = [int(sequence) for sequence in rng.permutation(problem.evaluate.sequences)]
        known = {int(sequence): loss for sequence, loss in memory["known"].items()}
        measured = Measured(problem, state.generation, {state.parent: known})
        seen = sequences_for(self.predicted_on, problem)
        predictions, remembered = PROPOSALS[self.proposal].predict(problem, measured, state, order[:seen], rng)
        offspring = self.propose(problem, state, predictions, rng)
        if not offspring:
            return replace(state, tokens=state.tokens + measured.tokens, exhausted=True), measured.rows
        unseen = order[seen:] + order[:seen]  # what the prediction was not made on comes first
        enough, most = (sequences_for(tokens, problem) for tokens in (self.tokens, self.tokens * self.growth))
        outcome = race(measured, state.parent, list(offspring), unseen, enough, most, self.errors)
        parent = outcome.leader if outcome.clear else state.parent
        remembered = PROPOSALS[self.proposal].learn(remembered, measured, state.parent, list(offspring))
        memory = remembered | {"damping": next_damping(memory["damping"], outcome, offspring[outcome.leader])}
        memory["known"] = {str(sequence): loss for sequence, loss in measured.known(parent).items()}
        fitness = float(measured.losses([parent], outcome.sequences).mean())
        tokens = state.tokens + measured.tokens
        return State(parent, fitness, state.generation + 1, tokens, rng_state(rng), memory=memory), measured.rows

    def propose(
        self, problem: Problem, state: State, predictions: Sequence[Changes], rng: np.random.Generator
    ) -> dict[Allocation, float]:
        """Distinct allocations, none like the parent, each with its damping; predictions take turns."""
        found: dict[Allocation, float] = {}
        if state.generation == 0:  # the plain knapsack, too
            _add(found, problem, state.parent, relaxed(predictions[0], problem.budget), LOWEST)
        priced = [(changes, prices_of(problem, state.parent, changes)) for changes in predictions]
        for attempt in range(4 * self.offspring):
            if len(found) >= self.offspring:
                break
            damping = state.memory["damping"] * RATIO ** (attempt % self.offspring - self.offspring / 2)
            # also where unused: each attempt draws as much
            drawn = np.exp(SPREAD * rng.standard_normal(len(state.parent)))
            factors = drawn if attempt % 2 or attempt >= self.offspring else np.ones(len(state.parent))
            changes, prices = priced[(3 * attempt + state.generation) % len(priced)]  # each meets all dampings in time
            losses = [g + damping * factor * price for g, price, factor in zip(changes, prices, factors, strict=True)]
            _add(found, problem, state.parent, relaxed(losses, problem.budget), damping)
        for _ in range(ATTEMPTS * self.offspring):  # where predictions give too little, blind exchanges
            if len(found) >= self.offspring:
                break
            child = exchange(problem, state.parent, int(rng.integers(1, EXCHANGES + 1)), rng)
            if child is not None:
                _add(found, problem, state.parent, child, state.memory["damping"])
        return found


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


def prices_of(problem: Problem, parent: Allocation, changes: Changes) -> list[np.ndarray]:
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
