"""The seam between search strategies and the rest of the application.

`Problem` is what a strategy is given, `Strategy` is the protocol that it implements, and `StrategyDefaults` answers
what most strategies answer alike. What a search remembers between generations is in `search.strategies.state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.budgets.budget import Budget
from search.evaluation.generation import Evaluator
from search.strategies.state import State
from supernet.space import Allocation, Space
from supernet.store import Supernet

FEWEST_SEQUENCES = 4  # to judge a difference on, if there are as many: on fewer it is mostly chance


@dataclass(frozen=True)
class Dense:
    """The dense model and a little text, for rules that look at weights and activations.

    Attributes:
        model: The dense model in main memory; its blocks are lent to the device one at a time.
        ids: The calibration text, (sequences, tokens) int64.
        batch: How many sequences go through the model in one forward pass.
        device: The device that does the work.
    """

    model: PreTrainedModel
    ids: Tensor
    batch: int
    device: torch.device


class Unmeasurable:
    """Stands in for the evaluator when a strategy needs no candidates: none are built, so none can be measured."""

    sequences = 0
    sequence_length = 0

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """Never called, as the strategy said."""
        raise NotImplementedError("this strategy said that it needs no candidates")

    def effects(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """Never called, as the strategy said."""
        raise NotImplementedError("this strategy said that it needs no candidates")


@dataclass(frozen=True)
class Problem:
    """What a strategy has to solve: find the allocation within a budget that has the smallest fitness.

    Attributes:
        space: The units, with their levels and costs.
        budget: What the allocation may cost.
        start: The allocation that the search begins at; it is within the budget.
        evaluate: Measures allocations on the search text.
        dense: The dense model and calibration text; None where there is none, and then most rules refuse.
        errors: For each unit, the squared output errors (levels,) that its candidates had when they were built,
            relative to the output that they were fitted to; 0 for the dense level. A unit whose pruner records no
            errors has None, and so has the whole problem if no candidates were built.
        supernet: Where the candidates themselves are, for rules that run them; None if none were built.
    """

    space: Space
    budget: Budget
    start: Allocation
    evaluate: Evaluator
    dense: Dense | None = None
    errors: Sequence[Sequence[float] | None] | None = None
    supernet: Supernet | None = None

    def allows(self, allocation: Allocation) -> bool:
        """Return whether an allocation meets the budget.

        It must not cost more, and must leave less than one smallest step of it, or no more than the start leaves.
        """
        return self.budget.allows(allocation, self.start)


@dataclass(frozen=True)
class HistoryRow:
    """One allocation measured in one selection step: a row of `history.parquet`.

    Attributes:
        generation: Which generation of the round this is, counted from 0.
        step: Which selection step of the generation this is, counted from 0.
        tokens: How many tokens the allocation was measured on.
        fitness: Its mean fitness over these tokens.
        survived: Whether the step kept the allocation.
        seconds: How long the whole step took.
        allocation: The allocation that was measured.
    """

    generation: int
    step: int
    tokens: int
    fitness: float
    survived: bool
    seconds: float
    allocation: Allocation


@dataclass(frozen=True)
class FrontPoint:
    """One point of a front of loss against cost: the best allocation that a search knows for a budget.

    Attributes:
        target: The budget, in the unit that the budget's first limit counts in.
        allocation: The best allocation so far.
        fitness: Its fitness when it was last measured; None if it has not been measured yet.
        tokens: How many tokens that measurement took.
    """

    target: int
    allocation: Allocation
    fitness: float | None = None
    tokens: int = 0


StateOf = TypeVar("StateOf", bound=State)  # the class of a strategy's own states


class Strategy(Protocol[StateOf]):
    """A way to find an allocation, one generation after the other.

    A run first asks `check_rounds`, `check_units`, `pool_warning` and `check_budget`, in this order and before it
    builds anything, so that a mistake costs seconds and not hours. Then, in each of its rounds of levels, it calls
    `begin` once, and `advance` until there have been `generations` of them or a state says `exhausted`; `front` is
    asked of the last state.

    Every state is saved before the next generation begins. A run that was killed calls `advance` with the state that
    was saved, on the same problem, and must come to the same result: so a strategy holds nothing but its settings.
    `StrategyDefaults` answers what most strategies answer alike.

    Attributes:
        name: What the method is called in settings (`strategy=<name>`), and in the model card.
        state_class: The class of its states, which reads them from a checkpoint.
        is_rule: Whether the allocation follows from a formula and not from a search: longer work would not improve it.
        looks_at: What the allocation comes from where none is measured, in words for the dry run.
    """

    name: ClassVar[str]
    state_class: ClassVar[type[State]]
    is_rule: ClassVar[bool]
    looks_at: ClassVar[str]

    @property
    def generations(self) -> int:
        """How many generations a round has at most."""
        ...

    @property
    def tokens_per_generation(self) -> int:
        """About how many tokens of the search text a generation passes through the model.

        Tokens that a gradient is taken on count three times. 0 says that no allocation is measured; then `looks_at`
        says what is done instead. The dry run prints the number, and nothing depends on it.
        """
        ...

    @property
    def needs_candidates(self) -> bool:
        """Whether the strategy looks at candidates.

        If it does not, a run builds no supernet for it and has a single round, over the levels of the last one. Then
        `Problem.evaluate` cannot measure anything, and `Problem.errors` is None.
        """
        ...

    def check_rounds(self, rounds: int) -> None:
        """Refuse (InputError) or advise against (a line in the log) a number of rounds, before a model is loaded."""
        ...

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Refuse units that the strategy has nothing to say about, with an InputError.

        Called when the dense model is in main memory and before anything is built, with the units of the first round.
        """
        ...

    def check_budget(self, space: Space, budget: Budget) -> None:
        """Refuse a budget that the strategy cannot answer, with an InputError.

        Called before the first round's build, with the space and budget of that round.
        """
        ...

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Return a warning if the search text is too short for this strategy, and None if it will do.

        Args:
            sequences: How many sequences the text has.
            length: How many tokens each of them has.
        """
        ...

    def begin(self, problem: Problem, seed: int) -> StateOf:
        """Return the state before the first generation of a round. Nothing may be measured here."""
        ...

    def advance(self, problem: Problem, state: StateOf) -> tuple[StateOf, list[HistoryRow]]:
        """Do one generation.

        Args:
            problem: The problem of the round, the same in all of its generations.
            state: The state that the generation before, or `begin`, returned. It must not be changed.

        Returns:
            The state after the generation, and what was measured on the way, for the history. A strategy that has
            nothing left to try returns a state with `exhausted` set. If it found that out before it did anything, the
            generation does not count: `generation` stays as it was, and there are no rows.
        """
        ...

    def front(self, state: StateOf) -> Sequence[FrontPoint] | None:
        """Return the points of a front, from the run's own budget to the densest, or None if there is no front.

        Only a strategy that searches several budgets at once has a front.
        """
        ...


class StrategyDefaults:
    """What most strategies answer alike: they measure candidates, and take any units, rounds and budget.

    A strategy that remembers more than `State` overrides `state_class`; one that searches several budgets, `front`.
    """

    state_class: ClassVar[type[State]] = State
    is_rule: ClassVar[bool] = False
    looks_at: ClassVar[str] = "the search text"

    @property
    def needs_candidates(self) -> bool:
        """Return True, because allocations are measured."""
        return True

    def check_rounds(self, rounds: int) -> None:
        """Take any number of rounds."""

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Take units of any kind."""

    def check_budget(self, space: Space, budget: Budget) -> None:
        """Take any budget."""

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn if there are so few sequences that differences between allocations are mostly chance."""
        if sequences >= FEWEST_SEQUENCES:
            return None
        return (
            f"data.sequences.search={sequences}: differences on so few are mostly chance; take at least "
            f"{FEWEST_SEQUENCES}"
        )

    def front(self, state: Any) -> Sequence[FrontPoint] | None:
        """Return None, because only the run's own budget is searched."""
        return None
