"""The fitness of many allocations at once.

A generation moves through the model sub-block by sub-block, not allocation by allocation: allocations that agree so far share
one state, and those that use the same level share its weights, loaded once. At the end all final states meet the dense
model's targets (`search.fitness`), which are computed once a sequence and kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.fitness import Targets, kl_divergence, targets
from supernet.architecture import entry, final_norm_and_head, sub_blocks
from supernet.encoding import Candidate
from supernet.errors import InputError
from supernet.placement import Place, places
from supernet.space import Allocation
from supernet.store import Supernet


class Evaluator(Protocol):
    """Measures allocations on chosen sequences of a pool."""

    sequences: int
    sequence_length: int

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """Mean fitness a token, (allocations,) float64, lower is better, on the sequences of these indices."""
        ...


class GenerationEvaluator:
    """KL divergence to the dense model, for a whole generation in one sweep."""

    def __init__(self, model: PreTrainedModel, supernet: Supernet, pool: Tensor, batch: int) -> None:
        """Bind to a model and a finished supernet.

        Args:
            model: The dense model, on the device where the work is done.
            supernet: Candidates of the model's units.
            pool: (sequences, tokens) int64 ids to measure on.
            batch: Sequences that move through the model together.
        """
        self.model, self.supernet, self.pool, self.batch = model, supernet, pool, batch
        self.places = places(model, supernet.space)
        self.sequences, self.sequence_length = pool.shape
        self._targets: dict[int, Targets] = {}

    @torch.no_grad()
    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """See `Evaluator`."""
        distinct = list(dict.fromkeys(allocations))
        totals = dict.fromkeys(distinct, 0.0)
        for start in range(0, len(chosen), self.batch):
            rows = [int(row) for row in chosen[start : start + self.batch]]
            ids = self.pool[rows].to(self.model.device)
            hidden, contexts = entry(self.model, ids)
            teacher = self._teacher(rows).to(hidden.device)
            normed = [final_norm_and_head(self.model, state) for state in self._final_states(distinct, hidden, contexts)]
            losses = kl_divergence([state.flatten(0, 1) for state, _ in normed], normed[0][1], teacher).double().sum(1)
            for allocation, loss in zip(distinct, losses.tolist(), strict=True):
                totals[allocation] += loss
        fitness = np.array([totals[a] for a in allocations]) / (len(chosen) * self.sequence_length)
        if not np.isfinite(fitness).all():
            raise InputError(f"the fitness of an allocation is not finite ({fitness}); try dtype=float32")
        return fitness

    def _final_states(self, allocations: Sequence[Allocation], hidden: Tensor, contexts: list[dict[str, Any]]) -> list[Tensor]:
        """The residual stream of each (distinct) allocation behind the last block."""
        states = [hidden]
        at = [0] * len(allocations)  # which state each allocation is in
        for place in self.places:
            chosen = [tuple(allocation[unit] for unit, _ in place.units) for allocation in allocations]
            wanted: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)  # levels -> state before -> state behind
            behind: list[Tensor] = []
            for before, levels in zip(at, chosen, strict=True):
                wanted[levels].setdefault(before, -1)
            candidates: dict[tuple[int, int], Candidate] = {}  # of this sub-block: several levels of it may share a layer's
            for levels, moves in sorted(wanted.items()):
                weights = place.weights(
                    [self._candidate(u, v, candidates) for (u, _), v in zip(place.units, levels, strict=True)]
                )
                for before in moves:
                    moves[before] = len(behind)
                    behind.append(_advanced(place, states[before], contexts, weights))
            at = [wanted[levels][before] for before, levels in zip(at, chosen, strict=True)]
            states = behind
        return [states[i] for i in at]

    def _candidate(self, unit: int, level: int, known: dict[tuple[int, int], Candidate]) -> Candidate | None:
        if level and (unit, level) not in known:
            known[unit, level] = self.supernet.candidate(unit, level, self.model.device)
        return known[unit, level] if level else None

    def _teacher(self, rows: list[int]) -> Targets:
        """Targets of the sequences, each made alone when first needed, so that no other sequence can change its rounding."""
        for row in rows:
            if row not in self._targets:
                state, contexts = entry(self.model, self.pool[row : row + 1].to(self.model.device))
                for part in sub_blocks(self.model):
                    state = part(state, contexts[part.block])
                normed, head = final_norm_and_head(self.model, state)
                self._targets[row] = targets(normed[0], head).to("cpu")
        return Targets.join([self._targets[row] for row in rows])


def _advanced(place: Place, hidden: Tensor, contexts: list[dict[str, Any]], weights: dict[str, Tensor] | None) -> Tensor:
    """The residual stream behind a sub-block with these parameters; None where it is absent."""
    return hidden if weights is None else place.part(hidden, contexts[place.part.block], weights)
