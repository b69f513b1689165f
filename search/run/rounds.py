"""The rounds of build and search: the levels, the budget and the start of each, and where those that are done ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from search.budgets.budget import Budget
from search.budgets.knapsack import closest, uniform
from search.run.components import Components
from search.run.directory import RunDirectory
from search.run.inputs import Inputs
from search.run.levels import Grid, Window
from search.strategies.base import FrontPoint
from search.strategies.state import State
from supernet.space import Allocation, Space

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """One round of build and search.

    Attributes:
        index: From 0.
        title: As the user reads it: "round 1 of 2".
        window: Its levels.
        budget: In these levels.
        start: The allocation that its search begins at: the uniform one, then what the round before found.
    """

    index: int
    title: str
    window: Window
    budget: Budget
    start: Allocation

    @property
    def space(self) -> Space:
        """Its units and levels."""
        return self.window.space


@dataclass(frozen=True)
class Found:
    """Where all rounds ended.

    Attributes:
        space: Of the last round.
        allocation: The best in it.
        budget: That it keeps.
        tokens: Forward tokens that the searches of all rounds spent.
        front: The points of a search that finds a front.
    """

    space: Space
    allocation: Allocation
    budget: Budget
    tokens: int
    front: Sequence[FrontPoint] | None = None

    @property
    def kept(self) -> dict[str, int]:
        """Members kept of each unit."""
        return self.space.kept(self.allocation)


class Rounds:
    """All rounds of a run, one after the other: each follows from what the one before it found."""

    def __init__(
        self,
        asked: int,
        components: Components,
        inputs: Inputs,
        directory: RunDirectory,
        budget: Callable[[Space], Budget],
    ) -> None:
        """Take what rounds follow from. Nothing is loaded yet.

        Args:
            asked: The rounds that the settings ask for.
            components: The strategy and the grid of levels.
            inputs: The units.
            directory: Where searches are saved.
            budget: Of a space; may take minutes, as latencies are measured where there are none.
        """
        self.asked = asked
        self._components, self._inputs, self._directory, self._budget = components, inputs, directory, budget
        self._searched: list[tuple[Round, State]] = []
        self._next: Round | None = None

    @cached_property
    def count(self) -> int:
        """How many of the rounds asked for make a difference.

        Levels that are fixed are the same in every round, and so are their candidates, unless these are built along the
        allocation that the last round found (`prune.accumulation=chosen`).
        """
        fixed = self._inputs.has_fixed_levels and self._components.accumulation != "chosen"
        return 1 if fixed or not self._components.strategy.needs_candidates else self.asked

    @property
    def why_one(self) -> str | None:
        """Why there is one round where more were asked for; None where there are as many as that."""
        if self.count == self.asked:
            return None
        if self._components.strategy.needs_candidates:
            return "the levels of this kind of pruning are fixed, and so are its candidates"
        return "this strategy looks at no candidates: all levels of the last round are there at once, none are built"

    @cached_property
    def finest(self) -> Window:
        """Every level that the last round could reach anywhere: where the uniform baseline is taken from."""
        step = self._components.grid.step / 2 ** (self.asked - 1)
        return Grid(ceil(1.0 / step - 1e-9) + 1, step).first(self._inputs.prunables)

    @cached_property
    def first_window(self) -> Window:
        """The levels of the first round; all of the last one for a strategy that needs no candidates, as they cost it
        nothing.
        """
        needs = self._components.strategy.needs_candidates
        return self._components.grid.first(self._inputs.prunables) if needs else self.finest

    @cached_property
    def first(self) -> Round:
        """The first round, with its budget told to the user."""
        space = self.first_window.space
        budget = self._budget(space)
        log.info("budget: %s", budget)
        if (why := self.why_one) is not None:
            log.info("rounds: one, as %s", why)
        self._components.strategy.check_budget(space, budget)
        start = uniform(space, budget)
        if not budget.met(start):
            nearest = 100 * space.cost(start) / space.dense_cost
            log.warning("no allocation of the first round comes that near; the search begins at %.1f %% kept", nearest)
        return Round(0, self._title(0), self.first_window, budget, start)

    def _after(self, before: Round, state: State) -> Round:
        """The round that follows on a searched one; its budget may have to be measured, so it is made once."""
        if self._next is not None and self._next.index == before.index + 1:
            return self._next
        kept = before.space.kept(state.parent)
        window = self._components.grid.around(self._inputs.prunables, kept, before.index + 1)
        budget = self._budget(window.space)
        start = closest(window.space.nearest(kept), budget)
        self._next = Round(before.index + 1, self._title(before.index + 1), window, budget, start)
        return self._next

    def state(self, one: Round) -> State | None:
        """Where the search of a round stands; None where it did not begin."""
        strategy = self._components.strategy
        return self._directory.load_state(one.index, one.space, strategy.generations, strategy.state_class)

    def is_over(self, state: State) -> bool:
        """Whether the search of a round ended there."""
        return state.exhausted or state.generation >= self._components.strategy.generations

    def searched(self) -> list[tuple[Round, State]]:
        """The rounds whose search is over, in order, with their last states."""
        while (one := self.following(self._searched)) is not None:
            state = self.state(one)
            if state is None or not self.is_over(state):
                break
            self._searched.append((one, state))
        return list(self._searched)

    def following(self, searched: Sequence[tuple[Round, State]]) -> Round | None:
        """The round that is to be built and searched next; None where all are searched."""
        if len(searched) == self.count:
            return None
        return self._after(*searched[-1]) if searched else self.first

    def found(self, searched: Sequence[tuple[Round, State]]) -> Found:
        """Where all rounds ended."""
        last, state = searched[-1]
        tokens = sum(state.tokens for _, state in searched)
        return Found(last.space, state.parent, last.budget, tokens, self._components.strategy.front(state))

    def _title(self, index: int) -> str:
        return f"round {index + 1} of {self.count}"
