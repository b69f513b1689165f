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
from supernet.architecture import SubBlock, entry, final_norm_and_head, sub_blocks
from supernet.encoding import sliced
from supernet.errors import InputError
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
        self.parts = sub_blocks(model)
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
        for index, part in enumerate(self.parts):
            wanted: dict[int, dict[int, int]] = defaultdict(dict)  # level -> state before -> state behind
            behind: list[Tensor] = []
            for before, allocation in zip(at, allocations, strict=True):
                wanted[allocation[index]].setdefault(before, -1)
            for level, moves in sorted(wanted.items()):
                advance = self._level(index, part, level)
                for before in moves:
                    moves[before] = len(behind)
                    behind.append(advance(states[before], contexts[part.block]))
            at = [wanted[allocation[index]][before] for before, allocation in zip(at, allocations, strict=True)]
            states = behind
        return [states[i] for i in at]

    def _level(self, index: int, part: SubBlock, level: int) -> Any:
        """A function (hidden, context) -> hidden that runs the sub-block at a level."""
        if level == 0:
            return part
        candidate = self.supernet.candidate(index, level, self.model.device)
        if not len(candidate.kept):
            return lambda hidden, context: hidden
        weights = sliced(part, candidate)
        return lambda hidden, context: part(hidden, context, weights)

    def _teacher(self, rows: list[int]) -> Targets:
        """Targets of the sequences, each made alone when first needed, so that no other sequence can change its rounding."""
        for row in rows:
            if row not in self._targets:
                state, contexts = entry(self.model, self.pool[row : row + 1].to(self.model.device))
                for part in self.parts:
                    state = part(state, contexts[part.block])
                normed, head = final_norm_and_head(self.model, state)
                self._targets[row] = targets(normed[0], head).to("cpu")
        return Targets.join([self._targets[row] for row in rows])
