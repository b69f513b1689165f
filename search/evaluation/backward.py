"""Takes one gradient backwards through the model, and predicts from it what every level of every unit would change.

The prediction is to first order. This file walks from sub-block to sub-block; what happens at one of them is in
`search.evaluation.gradient`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from search.evaluation.comparison import Comparison
from search.evaluation.forward import Forward
from search.evaluation.gradient import PartGradient, Scorer, part_gradient, presence
from supernet.candidates import Candidate, Members
from supernet.models.placement import Place, is_absent
from supernet.space import Allocation, Space

Batch = tuple[Tensor, Tensor]  # residual stream before a sub-block and gradient behind it, both (batch, tokens, hidden)


class Backward:
    """Walks from the gradient at the last hidden states back to the first sub-block."""

    def __init__(self, forward: Forward, comparison: Comparison, space: Space) -> None:
        """Bind to what runs the model and to what its final states are compared with."""
        self.forward, self.comparison, self.space = forward, comparison, space

    def effects(self, allocation: Allocation, rows: Sequence[int]) -> list[np.ndarray]:
        """Predict by how much each level of each unit changes the loss, summed over all tokens of some sequences.

        Args:
            allocation: Where the gradient is taken.
            rows: Indices of the sequences in the pool.

        Returns:
            (levels,) float64 for each unit; 0 at the level of the allocation.
        """
        found = [np.zeros(len(unit.levels)) for unit in self.space.units]
        inputs: list[list[Tensor]] = []
        texts = self.comparison.pool[list(rows)]
        (states,) = self.forward.final_states([allocation], texts, self.forward.batch_tokens, inputs)
        behind = self.comparison.gradients(states, rows)
        with self.forward.lent(backwards=True) as lent:
            for place in lent:
                behind = self._through(place, allocation, inputs.pop(), behind, found)
        return found

    def _through(
        self,
        place: Place,
        allocation: Allocation,
        states: Sequence[Tensor],
        behind: Sequence[Tensor],
        found: list[np.ndarray],
    ) -> list[Tensor]:
        """Take the gradient through one sub-block, and add to `found` what the levels of its units would change.

        Args:
            place: The sub-block, which is on the device, and its units.
            allocation: Where the gradient is taken.
            states: The residual stream before the sub-block, (tokens, hidden) for each sequence.
            behind: The gradients behind it, (tokens, hidden) each.
            found: (levels,) float64 for each unit, which is added to.

        Returns:
            The gradients before the sub-block, (tokens, hidden) for each sequence.
        """
        length = states[0].shape[0]
        context = self.forward.walk.context(place.part, length)
        size = max(1, self.forward.batch_tokens // length)
        parts = [(states[i : i + size], behind[i : i + size]) for i in range(0, len(states), size)]
        now = {unit: self.forward.candidate(unit, allocation[unit]) for unit, _ in place.units}
        if any(is_absent(candidate) for candidate in now.values()):
            for unit, level, weights in self._returns(place, now):
                for hidden, after in map(self._stacked, parts):
                    found[unit][level] += presence(place.part.change(hidden, context, weights), after)
            return list(behind)
        scorer, before = Scorer(place.part), list[Tensor]()
        wanted, with_bias = self._wanted(place, now)
        workers = self.forward.workers

        def gradient(batch: Batch) -> PartGradient:
            hidden, after = batch
            return part_gradient(workers.own(place.part), wanted, hidden, context, after, with_bias)

        for i in range(0, len(parts), workers.count):  # no more at a time, as each holds gradients of all weights
            before += scorer.add(workers.map(gradient, [self._stacked(part) for part in parts[i : i + workers.count]]))
        for unit, layer in place.units:
            found[unit] += scorer.effects(layer, self._levels(unit), allocation[unit])
        return before

    def _wanted(self, place: Place, now: Mapping[int, Candidate | None]) -> tuple[dict[str, Candidate | None], bool]:
        """Return the layers whose gradients are needed, with their candidates, and whether the last bias needs one."""
        # The levels of a unit are of one kind, which the first one that is not dense shows.
        samples = {unit: self.forward.candidate(unit, min(1, self._last(unit))) for unit in now}
        members = [sample for sample in samples.values() if isinstance(sample, Members)]
        layers = {layer or place.part.column: now[unit] for unit, layer in place.units if layer is not None or members}
        return layers, any(sample.bias is not None for sample in members)

    def _stacked(self, part: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Batch:
        states, behind = part
        return torch.stack([state.to(self.forward.device) for state in states]), torch.stack(list(behind))

    def _last(self, unit: int) -> int:
        return len(self.space.units[unit].levels) - 1

    def _levels(self, unit: int) -> Iterator[Candidate | None]:
        """Yield the candidates of a unit's levels one by one, as all of them may be as large as many blocks."""
        for level in range(self._last(unit) + 1):
            self.forward.cache.prefetch([(unit, level + 1)] if level < self._last(unit) else [])
            yield self.forward.candidate(unit, level)

    def _returns(
        self, place: Place, now: Mapping[int, Candidate | None]
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Yield each move (unit, level) that brings an absent sub-block back, with the parameters it then has."""
        for unit in now:
            for level, candidate in enumerate(self._levels(unit)):
                weights = place.weights([candidate if unit == other else now[other] for other, _ in place.units])
                if weights is not None:
                    yield unit, level, weights
