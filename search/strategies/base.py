"""The seam between search strategies and the rest: what a strategy is given, and the state it can be resumed from."""

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

FEWEST = 4  # sequences that a difference is judged on, unless there are no more: on fewer it is mostly chance


@dataclass(frozen=True)
class Dense:
    """The dense model and a little text, for rules that look at weights and activations.

    Attributes:
        model: In main memory; blocks are lent to the device one at a time.
        ids: (sequences, tokens) int64, the calibration text.
        batch: Sequences in one forward pass.
        device: Where the work is done.
    """

    model: PreTrainedModel
    ids: Tensor
    batch: int
    device: torch.device


class Unmeasurable:
    """The evaluator of a strategy that needs no candidates: none are built, so nothing can be measured."""

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
    """Find the allocation of `space` that meets `budget` with the smallest fitness, beginning at `start`.

    Attributes:
        errors: For each unit (levels,), the squared output errors that its candidates had when they were built,
            relative to what they were fitted to, 0 for the dense level; None for units whose pruner records none.
    """

    space: Space
    budget: Budget
    start: Allocation
    evaluate: Evaluator
    dense: Dense | None = None
    errors: Sequence[Sequence[float] | None] | None = None

    def allows(self, allocation: Allocation) -> bool:
        """Whether it meets the budget: to within one smallest step, or as nearly as the start."""
        return self.budget.allows(allocation, self.start)


@dataclass(frozen=True)
class HistoryRow:
    """One allocation measured in one selection step: a row of `history.parquet`.

    Attributes:
        generation: Of the round, from 0 on.
        step: Of the generation, from 0 on.
        tokens: That the allocation was measured on.
        fitness: Mean over these tokens.
        survived: Whether the step kept the allocation.
        seconds: That the whole step took.
        allocation: The allocation.
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
        target: The budget, in what the first limit counts.
        allocation: The best so far.
        fitness: Its fitness where it was last measured; None before that.
        tokens: How many tokens it was measured on there.
    """

    target: int
    allocation: Allocation
    fitness: float | None = None
    tokens: int = 0


StateOf = TypeVar("StateOf", bound=State)  # a strategy's own states


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
        """The most generations of a round."""
        ...

    @property
    def tokens_per_generation(self) -> int:
        """About how many tokens of the search text a generation passes through the model.

        A gradient's count three times. 0 says that no allocation is measured: then `looks_at` says what is done
        instead. The dry run prints it, and nothing depends on it.
        """
        ...

    @property
    def needs_candidates(self) -> bool:
        """Whether the strategy looks at candidates.

        If not, a run builds no supernet for it and searches in a single round among the levels of the last one;
        `Problem.evaluate` can measure nothing then, and `Problem.errors` is None.
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
        """What to tell the user of a search text of so many sequences of so many tokens; None where it will do."""
        ...

    def begin(self, problem: Problem, seed: int) -> StateOf:
        """Return the state before the first generation of a round. Nothing may be measured here."""
        ...

    def advance(self, problem: Problem, state: StateOf) -> tuple[StateOf, list[HistoryRow]]:
        """Do one generation.

        Args:
            problem: That of the whole round.
            state: As the generation before, or `begin`, left it. It is not to be changed.

        Returns:
            The state behind the generation, and what was measured on the way, for the history. A strategy that finds
            nothing left to try returns the state with `exhausted` set; where that was no generation of its own,
            `generation` and the rows stay as they were.
        """
        ...

    def front(self, state: StateOf) -> Sequence[FrontPoint] | None:
        """The points of a front, from the run's own budget to the densest; None where only one budget is searched."""
        ...


class StrategyDefaults:
    """What most strategies answer alike: a search that looks at candidates, for any units, rounds and budget.

    Its states are plain ones unless it says otherwise: then it overrides `state_class`, `begin` and `front`.
    """

    state_class: ClassVar[type[State]] = State
    is_rule: ClassVar[bool] = False
    looks_at: ClassVar[str] = "the search text"

    @property
    def needs_candidates(self) -> bool:
        """Return True: allocations are measured."""
        return True

    def check_rounds(self, rounds: int) -> None:
        """Take any number of rounds."""

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Take units of any kind."""

    def check_budget(self, space: Space, budget: Budget) -> None:
        """Take any budget."""

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn of fewer sequences than differences between allocations can be told from chance on."""
        if sequences >= FEWEST:
            return None
        return f"data.sequences.search={sequences}: differences on so few are mostly chance; take at least {FEWEST}"

    def front(self, state: Any) -> Sequence[FrontPoint] | None:
        """Return None: only the run's own budget is searched."""
        return None
