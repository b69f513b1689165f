"""Measures the fitness of many allocations at once.

A generation moves through the model sub-block by sub-block, not allocation by allocation (`search.evaluation.forward`).
At the end all final states are compared with the dense model's (`search.evaluation.comparison`). How many sequences and
allocations move together depends on how much memory there is (`search.evaluation.room`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluation.backward import Backward
from search.evaluation.comparison import Comparison
from search.evaluation.fitness import Fitness
from search.evaluation.forward import Forward
from search.evaluation.resources import STATES, Resources
from search.evaluation.room import Room
from supernet.space import Allocation
from supernet.store import Supernet
from supernet.system.memory import available

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Measures allocations on chosen sequences of a pool.

    Attributes:
        sequences: How many sequences the pool has.
        sequence_length: How many tokens each of them has.
    """

    sequences: int
    sequence_length: int

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """Measure allocations.

        Args:
            allocations: The allocations to be measured.
            chosen: (sequences,) distinct indices of sequences in the pool.

        Returns:
            The mean fitness of a token in each sequence, (allocations, sequences) float64. Lower is better; it is
            infinite where the loss is not finite.
        """
        ...

    def effects(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """Predict what each level of each unit would change, by one gradient at an allocation.

        Strategies count it as `GRADIENT_COST` forward passes (`search.strategies.measuring`).

        Args:
            allocation: Where the gradient is taken.
            chosen: (sequences,) distinct indices of sequences in the pool.

        Returns:
            For each unit (levels,) float64: by how much the mean fitness on these sequences changes, to first order,
            when this unit alone goes to that level; 0 at the level of the allocation. Numbers that are not finite say
            that the loss has no usable gradient at this allocation.
        """
        ...


class GenerationEvaluator:
    """Measures a whole generation in as few sweeps through the model as memory allows."""

    def __init__(
        self,
        model: PreTrainedModel,
        supernet: Supernet,
        pool: Tensor,
        fitness: Fitness,
        resources: Resources | None = None,
        unscored: int = 0,
    ) -> None:
        """Bind to a model and a finished supernet.

        Args:
            model: The dense model.
            supernet: The candidates of the model's units.
            pool: (sequences, tokens) int64 ids to measure on.
            fitness: The loss of a token.
            resources: The device, where the model lies, and how much memory may be taken; by default a CPU's.
            unscored: First positions of each sequence that are left out of the loss, as they predict tokens that always
                begin a sequence.
        """
        resources = resources or Resources()
        self.pool, self.supernet = pool, supernet
        self.sequences, self.sequence_length = pool.shape
        self.forward = Forward(model, supernet, resources)
        state_bytes = self.sequence_length * self.forward.state_bytes
        self.room = Room(resources.state_bytes(), state_bytes, self.forward.release)
        known = resources.teacher_targets()
        self.comparison = Comparison(self.forward, pool, fitness, known, self.room, unscored)
        self._backward = Backward(self.forward, self.comparison, supernet.space)
        self._overflowed = False  # whether the user has been told that a loss is not finite

    @torch.no_grad()
    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """Measure a generation in as few sweeps as memory allows; allocations that are equal are measured once."""
        distinct = sorted(set(allocations))  # those that begin alike stay together where memory asks for several sweeps
        rows = [int(row) for row in chosen]
        self.comparison.learn(rows)
        totals = dict(zip(distinct, self._sums(distinct, rows), strict=True))
        fitness = np.stack([totals[a] for a in allocations]) / self.comparison.scored
        finite = np.isfinite(fitness)
        if not finite.all() and not self._overflowed:
            self._overflowed = True
            log.warning("the loss of an allocation is not finite: such ones lose; dtype=float32 has a wider range")
        return np.where(finite, fitness, np.inf)

    @torch.no_grad()
    def effects(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """Walk a gradient backwards, with as many sequences at a time as memory holds."""
        rows = [int(row) for row in chosen]
        self.comparison.learn(rows)
        total = [np.zeros(len(unit.levels)) for unit in self.supernet.space.units]
        # The inputs of all sub-blocks are kept in main memory; one input takes half of `state_bytes`.
        limit = min(self.room.limit, int(available(torch.device("cpu")) * STATES))
        size = max(1, 2 * limit // (self.room.state_bytes * (len(self.forward.places) + 2)))
        while rows:
            some = rows[:size]
            found = self.room.tried(len(some), lambda some=some: self._backward.effects(allocation, some))  # type: ignore[misc]
            if found is None:
                size = max(1, len(some) // 2)
                continue
            rows = rows[len(some) :]
            total = [a + b for a, b in zip(total, found, strict=True)]
        scored = len(chosen) * self.comparison.scored
        return [one / scored for one in total]

    def use(self, fitness: Fitness) -> None:
        """Measure by another loss from now on. The dense model's targets that are known already serve it, too."""
        self.comparison.fitness = fitness

    def close(self) -> None:
        """Let go of candidates and threads; nothing can be measured any more."""
        self.forward.close()

    def _sums(self, allocations: Sequence[Allocation], rows: Sequence[int]) -> np.ndarray:
        """Return losses summed over tokens, (allocations, sequences) float64, in as many sweeps as memory asks for."""
        states = self.room.states
        if len(rows) > 1 and len(allocations) * len(rows) > states:
            size = max(1, states // len(allocations))
            parts = [self._sums(allocations, rows[i : i + size]) for i in range(0, len(rows), size)]
            return np.concatenate(parts, axis=1)
        if len(allocations) > states:
            parts = [self._sums(allocations[i : i + states], rows) for i in range(0, len(allocations), states)]
            return np.concatenate(parts)
        found = self.room.tried(len(allocations) * len(rows), lambda: self._swept(allocations, rows))
        return self._sums(allocations, rows) if found is None else found

    def _swept(self, allocations: Sequence[Allocation], rows: Sequence[int]) -> np.ndarray:
        """Return the same in a single sweep, whether or not memory holds it."""
        finals = self.forward.final_states(allocations, self.pool[list(rows)], self.forward.batch_tokens)
        return self.comparison.losses(finals, rows)
