"""Many allocations forward through the model at once, sub-block by sub-block.

Allocations that agree so far share one path. Those that use the same levels run as one batch with their weights, which
are loaded once, and the next sub-block's candidates are read meanwhile.
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

# Tokens in one pass through a sub-block; more gain nothing, and leave a CPU's caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

PathStates = list[Tensor]  # of one path through the model: a state (tokens, hidden) for each sequence at work
Move = tuple[tuple[int, ...], int]  # the levels of a sub-block's units, and the path in front of it


@dataclass(frozen=True)
class Batch:
    """States (tokens, hidden) that pass a sub-block together, with its parameters; None where it is absent."""

    states: list[Tensor]
    weights: dict[str, Tensor] | None


class Forward:
    """The model, its candidates and what they are run with.

    Attributes:
        places: The sub-blocks with the units that act on them, in the order of the forward pass.
        dense: The allocation of the dense model.
        walk: Turns ids into hidden states, and knows what attention gets besides.
        workers: Run batches side by side.
        cache: Candidates ready for use.
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
        """Return a unit's candidate; None for the dense level."""
        return self.cache.get(unit, level) if level else None

    def release(self) -> None:
        """Let go of all candidates, and of memory that torch keeps for itself."""
        self.cache.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of candidates and threads; nothing can be run any more."""
        self.cache.close()
        self.workers.close()

    @contextmanager
    def lent(self, backwards: bool = False) -> Iterator[Iterator[Place]]:
        """Give the places one after the other, or the other way round; the block of each is on the device meanwhile."""
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
        """Return the residual stream of each allocation behind the last block, for each text.

        Args:
            allocations: To be run.
            texts: (sequences, tokens) ids.
            batch_tokens: In one pass through a sub-block.
            inputs: Where it is given, the first allocation's stream before each sub-block is added to it, in main
                memory.
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
        """Take all allocations behind a sub-block: return the distinct paths, and which one each is on."""
        chosen = [tuple(allocation[unit] for unit, _ in place.units) for allocation in allocations]
        # Those with the same levels are beside each other.
        moves: dict[Move, None] = dict.fromkeys(sorted(zip(chosen, at, strict=True)))
        batches = self._batches(place, moves, paths, self._layers(place, allocations), size)
        paths.clear()  # batches alone hold the states now, and let go of them as they pass
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
        """Return what passes a sub-block, no more than `size` states at a time and each batch with its own weights."""
        batches: list[Batch] = []
        for levels, group in groupby(moves, key=lambda move: move[0]):
            weights = together(
                [layers.get((unit, level), {}) for (unit, _), level in zip(place.units, levels, strict=True)]
            )
            states = [state for _, before in group for state in paths[before]]
            batches += [Batch(states[i : i + size], weights) for i in range(0, len(states), size)]
        return batches

    def _layers(self, place: Place, allocations: Sequence[Allocation]) -> dict[Key, dict[str, Tensor] | None]:
        """What every level that is not dense makes of a sub-block: once, though several sets of levels may have it."""
        numbers = {unit: number for number, (unit, _) in enumerate(place.units)}
        return {
            (unit, level): place.of_unit(numbers[unit], self.cache.get(unit, level))
            for unit, level in _keys(place, allocations)
        }

    def _passed(self, place: Place, batch: Batch) -> list[Tensor]:
        """The states of a batch behind a sub-block."""
        if batch.weights is None:
            return batch.states
        states = torch.stack(batch.states)
        batch.states.clear()
        context = self.walk.context(place.part, states.shape[1])
        return list(self.workers.own(place.part)(states, context, batch.weights).unbind())


def _keys(place: Place, allocations: Sequence[Allocation]) -> list[Key]:
    """The candidates (unit, level) that a sub-block needs."""
    return sorted(
        {(unit, allocation[unit]) for allocation in allocations for unit, _ in place.units if allocation[unit]}
    )
