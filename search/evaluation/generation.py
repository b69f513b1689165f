"""The fitness of many allocations at once.

A generation moves through the model sub-block by sub-block, not allocation by allocation: allocations that agree so far
share one state, those that use the same level run as one batch with its weights, loaded once, and the next sub-block's
candidates are read meanwhile. At the end all final states meet the dense model's targets (`search.evaluation.fitness`),
which are computed once a sequence and kept. How many sequences and allocations move together follows from the memory
there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from local_prune.text.attention import blocked_attention
from local_prune.text.passes import Context, TextWalk, lent_head
from local_prune.text.workers import Workers
from search.evaluation.fitness import NO_LABEL, Fitness, Targets, targets, token_slices
from search.evaluation.gradient import Scorer, loss_gradient, part_gradient, presence
from search.evaluation.teacher import TeacherTargets
from supernet.cache import CandidateCache, Key
from supernet.candidates import Candidate, Members
from supernet.errors import InputError
from supernet.models.forward import final_norm_and_head
from supernet.models.placement import Place, is_absent, places, together
from supernet.space import Allocation
from supernet.store import Supernet
from supernet.system.memory import available, is_out_of_memory

log = logging.getLogger(__name__)

RESIDENT = ("model", "blocks")
BATCH_TOKENS = {
    "cpu": 1024,
    "cuda": 16384,
}  # in one pass through a sub-block; more gain nothing, and leave a CPU's caches
STATES, CANDIDATES = 0.4, 0.25  # shares of the free memory of the device
TARGETS = 0.1  # share of the free main memory

Result = TypeVar("Result")
Row = list[Tensor]  # of one path through the model: a state (tokens, hidden) for each sequence at work


@dataclass(frozen=True)
class Batch:
    """States (tokens, hidden) that pass a sub-block together, with its parameters; None where it is absent."""

    states: list[Tensor]
    weights: dict[str, Tensor] | None


class Evaluator(Protocol):
    """Measures allocations on chosen sequences of a pool."""

    sequences: int
    sequence_length: int

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """Mean fitness a token of each sequence, (allocations, sequences) float64, lower is better; infinite where it
        overflows.

        Args:
            allocations: To be measured.
            chosen: (sequences,) indices in the pool, distinct.
        """
        ...

    def changes(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """What the mean fitness on these sequences changes by, to first order, when one unit alone goes to another
        level.

        Returns:
            For each unit (levels,) float64; 0 at the level of the allocation. It costs `GRADIENT_COST` passes. Numbers
            that are not finite mean that there is no gradient to be had at this allocation.
        """
        ...


@dataclass(frozen=True)
class Resources:
    """Where things lie while a generation is measured, and how much room they take.

    Attributes:
        device: Where the work is done.
        resident: `model`: the dense model is on the device; `blocks`: only the block at work is, and the other weights
            stay where they are, in main memory or mapped from the checkpoint.
        memory: Bytes of hidden states at a time, and as many of the dense model's targets, which lie in main memory
            (what exceeds that, in files); None for shares of what is free.
        cache: Bytes of candidates kept from sweep to sweep; None for a share of what is free, or for none with
            `blocks`.
        scratch: Folder of the files that do not outlive the process; None for the system's.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resident: str = "model"
    memory: int | None = None
    cache: int | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if self.resident not in RESIDENT:
            raise InputError(f"evaluator.resident={self.resident} is not known; choose one of {', '.join(RESIDENT)}")

    def teacher_targets(self) -> TeacherTargets:
        """Room for the dense model's side of sequences."""
        limit = int(available() * TARGETS) if self.memory is None else self.memory
        return TeacherTargets(limit, self.scratch)


class GenerationEvaluator:
    """The losses of a whole generation, in as few sweeps through the model as memory allows."""

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
            supernet: Candidates of the model's units.
            pool: (sequences, tokens) int64 ids to measure on.
            fitness: The loss of a token.
            resources: Where things lie, and how much of them.
            unscored: First positions of each sequence that are left out of the loss, as they predict tokens that always
                begin a sequence.
        """
        self.unscored = unscored
        self.model, self.supernet, self.pool, self.fitness = model, supernet, pool, fitness
        self.resources = resources or Resources()
        self.device = self.resources.device
        if self.resources.resident == "model":
            model.to(self.device)  # type: ignore[arg-type]
        self.places = places(model, supernet.space)
        self.sequences, self.sequence_length = pool.shape
        self.dense: Allocation = (0,) * len(supernet.space.units)
        free = available(self.device)
        self.memory = int(free * STATES) if self.resources.memory is None else self.resources.memory
        cache = int(free * CANDIDATES) if self.resources.resident == "model" else 0
        self.cache = CandidateCache(self._read, cache if self.resources.cache is None else self.resources.cache)
        self.workers = Workers(self.device)
        self.text = TextWalk(model, self.device, self.resources.resident == "blocks")
        self._batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        self._targets = self.resources.teacher_targets()
        self._overflowed = False  # whether the user has been told that something did

    @torch.no_grad()
    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """See `Evaluator`."""
        distinct = sorted(set(allocations))  # neighbours share beginnings, also where memory parts them
        rows = [int(row) for row in chosen]
        self._learn_targets([row for row in dict.fromkeys(rows) if row not in self._targets])
        totals = dict(zip(distinct, self._sums(distinct, rows), strict=True))
        fitness = np.stack([totals[a] for a in allocations]) / self._scored
        finite = np.isfinite(fitness)
        if not finite.all() and not self._overflowed:
            self._overflowed = True
            log.warning("the loss of an allocation is not finite: such ones lose; dtype=float32 has a wider range")
        return np.where(finite, fitness, np.inf)

    @torch.no_grad()
    def changes(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """See `Evaluator`; walked backwards from stored inputs, as many sequences at a time as memory holds."""
        rows = [int(row) for row in chosen]
        self._learn_targets([row for row in dict.fromkeys(rows) if row not in self._targets])
        total = [np.zeros(len(unit.levels)) for unit in self.supernet.space.units]
        # inputs of all sub-blocks are in main memory
        room = min(self.memory, int(available(torch.device("cpu")) * STATES))
        size = max(1, 2 * room // (self._state_bytes * (len(self.places) + 2)))  # an input is half of `_state_bytes`
        while rows:
            some = rows[:size]
            found = self._tried(len(some), lambda some=some: self._changes(allocation, some))  # type: ignore[misc]
            if found is None:
                size = max(1, len(some) // 2)
                continue
            rows = rows[len(some) :]
            total = [a + b for a, b in zip(total, found, strict=True)]
        scored = len(chosen) * self._scored
        return [one / scored for one in total]

    def _changes(self, allocation: Allocation, rows: Sequence[int]) -> list[np.ndarray]:
        """Of the loss summed over tokens and sequences."""
        found = [np.zeros(len(unit.levels)) for unit in self.supernet.space.units]
        inputs: list[list[Tensor]] = []
        (states,) = self._final_states([allocation], rows, self._batch_tokens, inputs)
        with lent_head(self.model, self.device):
            behind = self.workers.map(
                lambda pair: self._loss_gradient(*pair),
                list(zip(states, rows, strict=True)),
            )
        with closing(self.text.lent(backwards=True)) as lent:
            for place, _ in zip(reversed(self.places), lent, strict=True):
                behind = self._backward(place, allocation, inputs.pop(), behind, found)
        return found

    def _loss_gradient(self, state: Tensor, row: int) -> Tensor:
        return loss_gradient(self.model, self.fitness, state, self._targets[row], self.pool[row], self.unscored)

    def _backward(
        self,
        place: Place,
        allocation: Allocation,
        states: Sequence[Tensor],
        behind: Sequence[Tensor],
        found: list[np.ndarray],
    ) -> list[Tensor]:
        """The gradients (tokens, hidden) before a sub-block; what its levels change is added to `found`."""
        context = self.text.context(place.part, self.sequence_length)
        size = max(1, self._batch_tokens // self.sequence_length)
        batches = [(states[i : i + size], behind[i : i + size]) for i in range(0, len(states), size)]
        now = {unit: self._candidate(unit, allocation[unit]) for unit, _ in place.units}

        def stacked(batch: tuple[Sequence[Tensor], Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
            return torch.stack([state.to(self.device) for state in batch[0]]), torch.stack(list(batch[1]))

        if any(is_absent(candidate) for candidate in now.values()):
            for unit, level, weights in self._returns(place, now):
                for hidden, after in map(stacked, batches):
                    found[unit][level] += presence(place.part.change(hidden, context, weights), after)
            return list(behind)
        samples = {
            unit: self._candidate(unit, min(1, self._last(unit))) for unit in now
        }  # the levels of a unit are of one kind
        members = [sample for sample in samples.values() if isinstance(sample, Members)]
        layers = {layer or place.part.column: now[unit] for unit, layer in place.units if layer is not None or members}
        with_bias = any(sample.bias is not None for sample in members)
        scorer, before = Scorer(place.part), list[Tensor]()
        for i in range(0, len(batches), self.workers.count):  # no more at a time: each has gradients of all weights
            before += scorer.add(
                self.workers.map(
                    lambda pair: part_gradient(
                        self.workers.own(place.part), layers, pair[0], context, pair[1], with_bias
                    ),
                    [stacked(batch) for batch in batches[i : i + self.workers.count]],
                )
            )
        for unit, layer in place.units:
            found[unit] += scorer.changes(layer, self._levels(unit), allocation[unit])
        return before

    def _last(self, unit: int) -> int:
        return len(self.supernet.space.units[unit].levels) - 1

    def _candidate(self, unit: int, level: int) -> Candidate | None:
        return self.cache.get(unit, level) if level else None

    def _levels(self, unit: int) -> Iterator[Candidate | None]:
        """The candidates of all levels of a unit, one after the other: together they may take as much as many
        blocks.
        """
        for level in range(self._last(unit) + 1):
            self.cache.prefetch([(unit, level + 1)] if level < self._last(unit) else [])
            yield self._candidate(unit, level)

    def _returns(
        self, place: Place, now: Mapping[int, Candidate | None]
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """The moves (unit, level) after which an absent sub-block is there again, and its parameters then."""
        for unit in now:
            for level, candidate in enumerate(self._levels(unit)):
                weights = place.weights([candidate if unit == other else now[other] for other, _ in place.units])
                if weights is not None:
                    yield unit, level, weights

    def close(self) -> None:
        """Let go of candidates and threads; nothing can be measured any more."""
        self.cache.close()
        self.workers.close()

    def _sums(self, allocations: Sequence[Allocation], rows: Sequence[int]) -> np.ndarray:
        """Losses summed over tokens, (allocations, sequences) float64, in as many sweeps as memory asks for."""
        room = max(1, self.memory // self._state_bytes)
        if len(rows) > 1 and len(allocations) * len(rows) > room:
            size = max(1, room // len(allocations))
            return np.concatenate(
                [self._sums(allocations, rows[i : i + size]) for i in range(0, len(rows), size)], axis=1
            )
        if len(allocations) > room:
            return np.concatenate(
                [self._sums(allocations[i : i + room], rows) for i in range(0, len(allocations), room)]
            )
        found = self._tried(
            len(allocations) * len(rows),
            lambda: self._losses(self._final_states(allocations, rows, self._batch_tokens), rows),
        )
        return self._sums(allocations, rows) if found is None else found

    def _tried(self, states: int, work: Callable[[], Result]) -> Result | None:
        """The result of work on so many states at a time; None where memory fell short, and half as many are to be
        tried.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if states == 1 or not is_out_of_memory(error):
                raise
        # out here the tensors of the failed work are gone
        self.memory = min(self.memory, states * self._state_bytes) // 2
        self.cache.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory with %d hidden states at a time; going on with half of them", states)
        return None

    @property
    def _scored(self) -> int:
        """How many tokens of a sequence have a loss."""
        return self.fitness.scored(self.sequence_length - self.unscored)

    @property
    def _state_bytes(self) -> int:
        """Of the residual stream of one sequence, twice: before and behind the sub-block at work."""
        width = self.model.get_input_embeddings().weight.shape[1]  # type: ignore[index]
        return (
            2
            * self.sequence_length
            * int(width)
            * (4 if self.places[0].part.wide_residual else self.model.dtype.itemsize)
        )

    def _learn_targets(self, rows: Sequence[int]) -> None:
        """The dense model's side of sequences, each passed alone, so that no other can change its rounding."""
        while rows:
            some = rows[: max(1, self.memory // self._state_bytes)]
            found = self._tried(len(some), lambda some=some: self._targets_of(some))  # type: ignore[misc]
            if found is not None:
                for row, one in zip(some, found, strict=True):
                    self._targets.add(row, one)
                rows = rows[len(some) :]

    def _targets_of(self, rows: Sequence[int]) -> list[Targets]:
        (states,) = self._final_states([self.dense], rows, self.sequence_length)
        with lent_head(self.model, self.device):
            return self.workers.map(self._target, states)

    def _target(self, state: Tensor) -> Targets:
        normed, head = final_norm_and_head(self.model, state)
        found = targets(normed, head, self.fitness.chunk_bytes // self.workers.count).to("cpu")
        if not bool(torch.isfinite(found.normaliser).all()):
            raise InputError("what the dense model predicts is not finite; check its weights, or use dtype=float32")
        return found

    def _final_states(
        self,
        allocations: Sequence[Allocation],
        rows: Sequence[int],
        batch_tokens: int,
        inputs: list[list[Tensor]] | None = None,
    ) -> list[Row]:
        """The residual stream of each allocation behind the last block, for each sequence.

        Where `inputs` is given, the first allocation's stream before each sub-block is added to it, in main memory.
        """
        paths: list[Row] = [[self.text.enter(self.pool[row : row + 1])[0] for row in rows]]
        at = [0] * len(allocations)  # the path that each allocation is on
        with blocked_attention(self.model), closing(self.text.lent()) as lent:
            for index, (place, _) in enumerate(zip(self.places, lent, strict=True)):
                if index + 1 < len(self.places):
                    self.cache.prefetch(_keys(self.places[index + 1], allocations))
                if inputs is not None:
                    inputs.append([state.to("cpu") for state in paths[at[0]]])
                paths, at = self._step(place, allocations, paths, at, batch_tokens)
        return [paths[path] for path in at]

    def _step(
        self,
        place: Place,
        allocations: Sequence[Allocation],
        paths: list[Row],
        at: Sequence[int],
        batch_tokens: int,
    ) -> tuple[list[Row], list[int]]:
        """All allocations behind a sub-block: the distinct paths, and which one each is on."""
        context = self.text.context(place.part, self.sequence_length)
        chosen = [tuple(allocation[unit] for unit, _ in place.units) for allocation in allocations]
        moves = dict.fromkeys(sorted(zip(chosen, at, strict=True)))  # those with the same levels beside each other
        layers = self._layers(place, allocations)
        size = max(1, batch_tokens // self.sequence_length)
        batches: list[Batch] = []
        for levels, group in groupby(moves, key=lambda move: move[0]):
            weights = together(
                [layers.get((unit, level), {}) for (unit, _), level in zip(place.units, levels, strict=True)]
            )
            states = [state for _, before in group for state in paths[before]]
            batches += [Batch(states[i : i + size], weights) for i in range(0, len(states), size)]
        del states
        paths.clear()  # batches alone hold the states now, and let go of them as they pass
        passed = self.workers.map(lambda batch: self._passed(place, batch, context), batches)
        states = [state for batch in passed for state in batch]
        sequences = len(states) // len(moves)
        index = {move: number for number, move in enumerate(moves)}
        behind = [states[i : i + sequences] for i in range(0, len(states), sequences)]
        return behind, [index[move] for move in zip(chosen, at, strict=True)]

    def _layers(self, place: Place, allocations: Sequence[Allocation]) -> dict[Key, dict[str, Tensor] | None]:
        """What every level that is not dense makes of a sub-block: once, though several sets of levels may have it."""
        numbers = {unit: number for number, (unit, _) in enumerate(place.units)}
        return {
            (unit, level): place.of_unit(numbers[unit], self.cache.get(unit, level))
            for unit, level in _keys(place, allocations)
        }

    def _passed(self, place: Place, batch: Batch, context: Context) -> list[Tensor]:
        """The states of a batch behind a sub-block."""
        if batch.weights is None:
            return batch.states
        states = torch.stack(batch.states)
        batch.states.clear()
        return list(self.workers.own(place.part)(states, context, batch.weights).unbind())

    def _losses(self, finals: Sequence[Row], rows: Sequence[int]) -> np.ndarray:
        """Summed over tokens, (allocations, sequences) float64."""
        scored = self.sequence_length - self.unscored
        pieces = [
            slice(piece.start + self.unscored, piece.stop + self.unscored)
            for piece in token_slices(scored, len(finals), self.fitness.chunk_bytes // self.workers.count)
        ]
        with lent_head(self.model, self.device):
            found = self.workers.map(
                lambda work: self._loss([row_of[work[0]][work[2]] for row_of in finals], work[1], work[2]),
                [(number, row, piece) for number, row in enumerate(rows) for piece in pieces],
            )
        return torch.stack(found).view(len(rows), len(pieces), -1).sum(1).T.cpu().numpy()

    def _loss(self, states: Sequence[Tensor], row: int, piece: slice) -> Tensor:
        """Of some tokens of a sequence, summed, (allocations,) float64; states (tokens, hidden) of each allocation."""
        normed, head = final_norm_and_head(self.model, torch.stack(list(states)))
        teacher = self._targets[row][piece].to(self.device)
        labels = nn.functional.pad(self.pool[row, 1:], (0, 1), value=NO_LABEL)[piece].to(self.device)
        return self.fitness(normed, head, teacher, labels).double().sum(1)

    def _read(self, unit: int, level: int) -> Candidate:
        return self.supernet.candidate(unit, level, self.device)


def _keys(place: Place, allocations: Sequence[Allocation]) -> list[Key]:
    """The candidates (unit, level) that a sub-block needs."""
    return sorted(
        {(unit, allocation[unit]) for allocation in allocations for unit, _ in place.units if allocation[unit]}
    )
