"""The seam between search strategies and the rest: what a strategy is given, and the state it can be resumed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.budgets.budget import Budget
from search.evaluation.generation import Evaluator
from supernet.space import Allocation, Space


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

    def changes(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
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
class State:
    """All that a strategy remembers between generations; JSON-able, so that a killed run goes on exactly.

    Attributes:
        parent: The best allocation so far.
        fitness: Its fitness where it was last measured; NaN before that.
        generation: Generations done.
        tokens: Forward tokens spent (each sequence counted for each allocation measured on it).
        rng: State of numpy's PCG64.
        exhausted: No further allocation can be proposed.
        memory: What else a strategy wants to remember.
    """

    parent: Allocation
    fitness: float
    generation: int
    tokens: int
    rng: dict[str, Any]
    exhausted: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def generator(self) -> np.random.Generator:
        """The random generator as it was left."""
        bits = np.random.PCG64()
        bits.state = cast(Any, self.rng)
        return np.random.Generator(bits)


@dataclass(frozen=True)
class Row:
    """One evaluated allocation in one selection step: a row of `history.parquet`."""

    generation: int
    step: int
    tokens: int
    fitness: float
    survived: bool
    seconds: float
    allocation: Allocation


class Strategy(Protocol):
    """A search that advances generation by generation."""

    @property
    def generations(self) -> int:
        """How many there are at most."""
        ...

    @property
    def tokens_per_generation(self) -> int:
        """About how many forward tokens a generation costs (a gradient's count three times)."""
        ...

    @property
    def needs_candidates(self) -> bool:
        """Whether it looks at candidates: if not, no supernet is built for it, and nothing can be measured."""
        ...

    def begin(self, problem: Problem, seed: int) -> State:
        """The state before the first generation."""
        ...

    def advance(self, problem: Problem, state: State) -> tuple[State, list[Row]]:
        """One generation further, and what was measured on the way."""
        ...


def first_state(problem: Problem, seed: int, memory: dict[str, Any] | None = None) -> State:
    """The state before the first generation, at the start."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return State(problem.start, float("nan"), 0, 0, rng_state(rng), memory=memory or {})


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    return cast(dict[str, Any], rng.bit_generator.state)
