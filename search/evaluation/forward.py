"""Runs many allocations forward through the model at once, sub-block by sub-block.

Allocations that have agreed so far share one path, which is computed once. In a sub-block, all those that use the same
levels run as one batch with these weights, which are loaded once. Meanwhile the next sub-block's candidates are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.text.attention import blocked_attention
from local_prune.text.passes import TextWalk
from local_prune.text.workers import Workers
from search.evaluation.resources import Resources
from supernet.cache import CandidateCache, Key
from supernet.candidates import Candidate
from supernet.models.placement import Place, places, together
from supernet.space import Allocation
from supernet.store import Supernet

# Tokens in one pass through a sub-block: more of them gain nothing, and do not fit in a CPU's caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

PathStates = list[Tensor]  # one path through the model: a state (tokens, hidden) for each sequence at work
Move = tuple[tuple[int, ...], int]  # the levels of a sub-block's units, and the number of the path in front of it


@dataclass(frozen=True)
class Batch:
    """States that pass a sub-block together.

    Attributes:
        states: (tokens, hidden) each.
        weights: Parameters of the sub-block that stand for the dense ones, by name; None where it is absent.
    """

    states: list[Tensor]
    weights: dict[str, Tensor] | None


class Forward:
    """Holds the model and its candidates, and runs allocations.

    Attributes:
        places: The sub-blocks with the units that act on them, in the order of the forward pass.
        dense: The allocation of the dense model.
        walk: Turns ids into hidden states, and knows what else attention takes as arguments.
        workers: Threads that run batches side by side.
        cache: Candidates that are in memory, ready for use.
        batch_tokens: Tokens in one pass through a sub-block.
    """

    def __init__(self, model: PreTrainedModel, supernet: Supernet, resources: Resources) -> None:
        """Bind to a model and a finished supernet of its units."""
        self.model, self.device = model, resources.device
        if not resources.lends_blocks:
            model.to(self.device)  # type: ignore[arg-type]
        self.places = places(model, supernet.space)
        self.dense: Allocation = (0,) * len(supernet.space.units)
        self.walk = TextWalk(model, self.device, resources.lends_blocks)
        self.workers = Workers(self.device)
        self.cache = CandidateCache(
            lambda unit, level: supernet.candidate(unit, level, self.device), resources.candidate_bytes()
        )
        self.batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])

    @property
    def state_bytes(self) -> int:
        """How many bytes a token's residual stream takes twice: before and behind the sub-block at work."""
        width = int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        return 2 * width * (4 if self.places[0].part.wide_residual else self.model.dtype.itemsize)

    def candidate(self, unit: int, level: int) -> Candidate | None:
        """Return the candidate of a unit at a level; None for the dense level, which has none."""
        return self.cache.get(unit, level) if level else None

    def release(self) -> None:
        """Let go of all candidates, and of the device's memory that torch keeps for later."""
        self.cache.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of candidates and threads; nothing can be run any more."""
        self.cache.close()
        self.workers.close()

    @contextmanager
    def lent(self, backwards: bool = False) -> Iterator[Iterator[Place]]:
        """Yield an iterator over the places, forwards or backwards, which keeps the block at work on the device."""
        order = reversed(self.places) if backwards else self.places
        with closing(self.walk.lent(backwards)) as lent:
            yield (place for place, _ in zip(order, lent, strict=True))

    def final_states(
        self,
        allocations: Sequence[Allocation],
        texts: Tensor,
        batch_tokens: int,
        inputs: list[list[Tensor]] | None = None,
    ) -> list[PathStates]:
        """Return the residual stream of each allocation behind the last block, before the final norm.

        Args:
            allocations: The allocations to be run.
            texts: (sequences, tokens) ids.
            batch_tokens: How many tokens go through a sub-block in one pass; at least one sequence does.
            inputs: A list, if the residual streams of the first allocation are wanted, too: for each sub-block its
                stream before it, in main memory, is appended.

        Returns:
            For each allocation a state (tokens, hidden) for each sequence; allocations that agree share theirs.
        """
        paths: list[PathStates] = [[self.walk.enter(text)[0] for text in texts.split(1)]]
        at = [0] * len(allocations)  # the path that each allocation is on
        with blocked_attention(self.model), self.lent() as lent:
            for index, place in enumerate(lent):
                if index + 1 < len(self.places):
                    self.cache.prefetch(_keys(self.places[index + 1], allocations))
                if inputs is not None:
                    inputs.append([state.to("cpu") for state in paths[at[0]]])
                paths, at = self._step(place, allocations, paths, at, max(1, batch_tokens // texts.shape[1]))
        return [paths[path] for path in at]

    def _step(
        self,
        place: Place,
        allocations: Sequence[Allocation],
        paths: list[PathStates],
        at: Sequence[int],
        size: int,
    ) -> tuple[list[PathStates], list[int]]:
        """Take all allocations through a sub-block; return the distinct paths behind it, and which one each is on."""
        chosen = [tuple(allocation[unit] for unit, _ in place.units) for allocation in allocations]
        # Sorted, so that moves with the same levels are beside each other.
        moves: dict[Move, None] = dict.fromkeys(sorted(zip(chosen, at, strict=True)))
        batches = self._batches(place, moves, paths, self._layers(place, allocations), size)
        paths.clear()  # only the batches hold the states now, and let go of them as they pass
        passed = self.workers.map(lambda batch: self._passed(place, batch), batches)
        states = [state for batch in passed for state in batch]
        sequences = len(states) // len(moves)
        behind = [states[i : i + sequences] for i in range(0, len(states), sequences)]
        index = {move: number for number, move in enumerate(moves)}
        return behind, [index[move] for move in zip(chosen, at, strict=True)]

    def _batches(
        self,
        place: Place,
        moves: dict[Move, None],
        paths: Sequence[PathStates],
        layers: dict[Key, dict[str, Tensor] | None],
        size: int,
    ) -> list[Batch]:
        """Return the batches that pass a sub-block: at most `size` states each, all of which use the same weights."""
        batches: list[Batch] = []
        for levels, group in groupby(moves, key=lambda move: move[0]):
            weights = together(
                [layers.get((unit, level), {}) for (unit, _), level in zip(place.units, levels, strict=True)]
            )
            states = [state for _, before in group for state in paths[before]]
            batches += [Batch(states[i : i + size], weights) for i in range(0, len(states), size)]
        return batches

    def _layers(self, place: Place, allocations: Sequence[Allocation]) -> dict[Key, dict[str, Tensor] | None]:
        """Return the parameters that each level in use changes, made once even where several sets of levels share it.

        The dense level changes none and is left out; None stands for a level that leaves nothing of the sub-block.
        """
        numbers = {unit: number for number, (unit, _) in enumerate(place.units)}
        return {
            (unit, level): place.of_unit(numbers[unit], self.cache.get(unit, level))
            for unit, level in _keys(place, allocations)
        }

    def _passed(self, place: Place, batch: Batch) -> list[Tensor]:
        """Return the states of a batch behind a sub-block, and let go of those before it."""
        if batch.weights is None:
            return batch.states
        states = torch.stack(batch.states)
        batch.states.clear()
        context = self.walk.context(place.part, states.shape[1])
        return list(self.workers.own(place.part)(states, context, batch.weights).unbind())


def _keys(place: Place, allocations: Sequence[Allocation]) -> list[Key]:
    """Return the candidates (unit, level) that a sub-block needs, which are those of levels that are not dense."""
    return sorted(
        {(unit, allocation[unit]) for allocation in allocations for unit, _ in place.units if allocation[unit]}
    )
