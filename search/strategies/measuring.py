"""Measuring allocations on the sequences of a pool: nothing twice, everything counted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.strategies.base import HistoryRow, Problem
from search.strategies.state import read_allocation, read_count, read_number
from supernet.space import Allocation

GRADIENT_COST = 3  # passes that a gradient counts as: one forward, and backward as two


@dataclass(frozen=True)
class Pair:
    """Two allocations measured on the same sequences.

    Attributes:
        first: An allocation.
        second: Another one.
        difference: Mean loss of the first less that of the second.
        sequences: How many sequences the mean is over.
    """

    first: Allocation
    second: Allocation
    difference: float
    sequences: int

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Pair:
        """Return the pair that a state wrote."""
        return Pair(
            read_allocation(content["first"]),
            read_allocation(content["second"]),
            read_number(content["difference"]),
            read_count(content["sequences"]),
        )


class Measured:
    """The losses of one generation: what is known of each allocation on each sequence, and what that cost.

    Attributes:
        rows: For the history.
        tokens: Forward tokens spent.
    """

    def __init__(
        self, problem: Problem, generation: int, known: Mapping[Allocation, Mapping[int, float]] | None = None
    ) -> None:
        """Begin a generation.

        Args:
            problem: Whose evaluator measures.
            generation: Its number.
            known: Losses from before, by allocation and sequence.
        """
        self.problem, self.generation = problem, generation
        self.rows: list[HistoryRow] = []
        self.tokens = 0
        self._steps = 0
        self._known: defaultdict[Allocation, dict[int, float]] = defaultdict(dict)
        for allocation, losses in (known or {}).items():
            self._known[allocation] |= losses

    def losses(self, allocations: Sequence[Allocation], sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """The fitness on each sequence, (allocations, sequences) float64; what is known is not measured again."""
        wanted = [int(sequence) for sequence in sequences]
        missing: defaultdict[tuple[int, ...], list[Allocation]] = defaultdict(list)
        for allocation in dict.fromkeys(allocations):
            missing[tuple(one for one in wanted if one not in self._known[allocation])].append(allocation)
        for some, alike in missing.items():
            if some:
                found = self.problem.evaluate(alike, np.array(some))
                for allocation, row in zip(alike, found, strict=True):
                    self._known[allocation] |= zip(some, map(float, row), strict=True)
                self.tokens += len(alike) * len(some) * self.problem.evaluate.sequence_length
        return np.array([[self._known[allocation][one] for one in wanted] for allocation in allocations])

    def effects(self, allocation: Allocation, sequences: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Take a gradient (`Evaluator.effects`), which counts as three passes over its tokens."""
        self.tokens += GRADIENT_COST * len(sequences) * self.problem.evaluate.sequence_length
        return self.problem.evaluate.effects(allocation, np.asarray(sequences))

    def known(self, allocation: Allocation) -> dict[int, float]:
        """The losses of an allocation on the sequences that it was measured on."""
        return dict(self._known[allocation])

    def step(
        self, alive: Sequence[Allocation], sequences: Sequence[int] | np.ndarray, survivors: int
    ) -> list[Allocation]:
        """One selection step: the fittest of `alive` on these sequences, best first; the earlier one wins a tie."""
        begun = time.perf_counter()
        fitness = self.losses(alive, sequences).mean(1)
        best = np.argsort(fitness, kind="stable")[:survivors]
        self.note(alive, fitness, len(sequences), set(best.tolist()), time.perf_counter() - begun)
        return [alive[i] for i in best]

    def note(
        self, alive: Sequence[Allocation], fitness: np.ndarray, sequences: int, survived: set[int], seconds: float
    ) -> None:
        """Add the rows of a selection step: which of the measured (by index) survived it."""
        tokens = sequences * self.problem.evaluate.sequence_length
        self.rows += [
            HistoryRow(self.generation, self._steps, tokens, float(fitness[i]), i in survived, seconds, allocation)
            for i, allocation in enumerate(alive)
        ]
        self._steps += 1


def sequences_for(tokens: int, problem: Problem) -> int:
    """Sequences that hold at least `tokens` tokens, or the whole pool."""
    return min(-(-tokens // problem.evaluate.sequence_length), problem.evaluate.sequences)
