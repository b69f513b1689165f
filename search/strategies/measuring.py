"""Measures allocations for a strategy, measures nothing twice, and counts the tokens that it costs.

Every strategy that measures makes one `Measured` a generation. It asks the problem's evaluator, keeps what it answered,
and writes the rows of the history.
"""

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

GRADIENT_COST = 3  # forward passes that a gradient counts as: its own one, and two for the way back


@dataclass(frozen=True)
class Pair:
    """Two allocations measured on the same sequences.

    Attributes:
        first: One allocation.
        second: The other one.
        difference: The mean loss of the first one minus that of the second one.
        sequences: How many sequences the means are over.
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
    """The losses that one generation knows, by allocation and sequence, and what it has spent on them.

    Attributes:
        rows: The rows of the history so far, one for each allocation and selection step.
        tokens: How many forward tokens have been spent.
    """

    def __init__(
        self, problem: Problem, generation: int, known: Mapping[Allocation, Mapping[int, float]] | None = None
    ) -> None:
        """Begin a generation.

        Args:
            problem: The problem whose evaluator measures.
            generation: The number of the generation, for the history.
            known: Losses known from before, by allocation and sequence.
        """
        self.problem, self.generation = problem, generation
        self.rows: list[HistoryRow] = []
        self.tokens = 0
        self._steps = 0
        self._known: defaultdict[Allocation, dict[int, float]] = defaultdict(dict)
        for allocation, losses in (known or {}).items():
            self._known[allocation] |= losses

    def losses(self, allocations: Sequence[Allocation], sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the losses, (allocations, sequences) float64; only those not known yet are measured."""
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
        """Predict by one gradient what each level of each unit would change, and count it as three forward passes.

        Returns:
            For each unit (levels,) float64, as `Evaluator.effects` says.
        """
        self.tokens += GRADIENT_COST * len(sequences) * self.problem.evaluate.sequence_length
        return self.problem.evaluate.effects(allocation, np.asarray(sequences))

    def known(self, allocation: Allocation) -> dict[int, float]:
        """Return the losses of an allocation, by the sequences that it was measured on."""
        return dict(self._known[allocation])

    def step(
        self, alive: Sequence[Allocation], sequences: Sequence[int] | np.ndarray, survivors: int
    ) -> list[Allocation]:
        """Do one selection step: return the fittest allocations on these sequences, best first.

        Of two equal ones the earlier one wins. The step is noted in the history.
        """
        begun = time.perf_counter()
        fitness = self.losses(alive, sequences).mean(1)
        best = np.argsort(fitness, kind="stable")[:survivors]
        self.note(alive, fitness, len(sequences), set(best.tolist()), time.perf_counter() - begun)
        return [alive[i] for i in best]

    def note(
        self, alive: Sequence[Allocation], fitness: np.ndarray, sequences: int, survived: set[int], seconds: float
    ) -> None:
        """Add the rows of a selection step to the history.

        Args:
            alive: The allocations that entered the step.
            fitness: The mean fitness of each, (allocations,).
            sequences: How many sequences they were measured on.
            survived: The indices of those that the step kept.
            seconds: How long the step took.
        """
        tokens = sequences * self.problem.evaluate.sequence_length
        self.rows += [
            HistoryRow(self.generation, self._steps, tokens, float(fitness[i]), i in survived, seconds, allocation)
            for i, allocation in enumerate(alive)
        ]
        self._steps += 1


def sequences_for(tokens: int, problem: Problem) -> int:
    """Return how many sequences hold at least so many tokens; the whole pool if it has fewer."""
    return min(-(-tokens // problem.evaluate.sequence_length), problem.evaluate.sequences)
