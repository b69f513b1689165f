"""Compares final hidden states of allocations with the dense model's.

The dense model's side, its targets, is computed once for each sequence. From targets and states follow the losses and
their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from local_prune.text.passes import lent_head
from search.evaluation.fitness import NO_LABEL, Fitness, Targets, targets, token_slices
from search.evaluation.forward import Forward, PathStates
from search.evaluation.gradient import loss_gradient
from search.evaluation.room import Room
from search.evaluation.teacher import TeacherTargets
from supernet.errors import InputError
from supernet.models.forward import final_norm_and_head


class Comparison:
    """Gives the loss of final states on the sequences of a pool, and computes the targets of each sequence only once.

    Attributes:
        fitness: The loss of a token. It may be replaced by another one at any time, as the targets serve all of them.
        targets: The dense model's side of the sequences that have been asked for so far.
    """

    def __init__(
        self, forward: Forward, pool: Tensor, fitness: Fitness, known: TeacherTargets, room: Room, unscored: int
    ) -> None:
        """Begin with the targets that are known already.

        Args:
            forward: Runs the dense model.
            pool: (sequences, tokens) int64 ids.
            fitness: The loss of a token.
            known: Targets by the number of their sequence; new ones are added.
            room: How many hidden states may exist at a time.
            unscored: First positions of each sequence that are left out of the loss.
        """
        self.forward, self.pool, self.fitness, self.targets = forward, pool, fitness, known
        self._room, self._unscored = room, unscored

    @property
    def scored(self) -> int:
        """The number of tokens of a sequence that have a loss."""
        return self.fitness.scored(self.pool.shape[1] - self._unscored)

    def learn(self, rows: Sequence[int]) -> None:
        """Compute the targets of these sequences that are not known yet.

        Each sequence passes alone, so that no other one can change its rounding.
        """
        missing = [row for row in dict.fromkeys(rows) if row not in self.targets]
        while missing:
            some = missing[: self._room.states]
            found = self._room.tried(len(some), lambda some=some: self._targets_of(some))  # type: ignore[misc]
            if found is not None:
                for row, one in zip(some, found, strict=True):
                    self.targets.add(row, one)
                missing = missing[len(some) :]

    def losses(self, finals: Sequence[PathStates], rows: Sequence[int]) -> np.ndarray:
        """Return the losses of final states, summed over tokens.

        Args:
            finals: The final states of each allocation, (tokens, hidden) for each sequence.
            rows: Indices of these sequences in the pool; their targets must be known.

        Returns:
            (allocations, sequences) float64.
        """
        workers = self.forward.workers
        scored = self.pool.shape[1] - self._unscored
        pieces = [
            slice(piece.start + self._unscored, piece.stop + self._unscored)
            for piece in token_slices(scored, len(finals), self.fitness.chunk_bytes // workers.count)
        ]
        with lent_head(self.forward.model, self.forward.device):
            found = workers.map(
                lambda work: self._loss([states[work[0]][work[2]] for states in finals], work[1], work[2]),
                [(number, row, piece) for number, row in enumerate(rows) for piece in pieces],
            )
        return torch.stack(found).view(len(rows), len(pieces), -1).sum(1).T.cpu().numpy()

    def gradients(self, states: PathStates, rows: Sequence[int]) -> list[Tensor]:
        """Return the gradients of the summed losses at one allocation's final states, each of its state's shape."""
        with lent_head(self.forward.model, self.forward.device):
            return self.forward.workers.map(lambda pair: self._gradient(*pair), list(zip(states, rows, strict=True)))

    def _gradient(self, state: Tensor, row: int) -> Tensor:
        model = self.forward.model
        return loss_gradient(model, self.fitness, state, self.targets[row], self.pool[row], self._unscored)

    def _loss(self, states: Sequence[Tensor], row: int, piece: slice) -> Tensor:
        """Sum the losses of some tokens of a sequence: states (tokens, hidden) each -> (allocations,) float64."""
        normed, head = final_norm_and_head(self.forward.model, torch.stack(list(states)))
        teacher = self.targets[row][piece].to(self.forward.device)
        labels = nn.functional.pad(self.pool[row, 1:], (0, 1), value=NO_LABEL)[piece].to(self.forward.device)
        return self.fitness(normed, head, teacher, labels).double().sum(1)

    def _targets_of(self, rows: Sequence[int]) -> list[Targets]:
        (states,) = self.forward.final_states([self.forward.dense], self.pool[list(rows)], self.pool.shape[1])
        with lent_head(self.forward.model, self.forward.device):
            return self.forward.workers.map(self._target, states)

    def _target(self, state: Tensor) -> Targets:
        normed, head = final_norm_and_head(self.forward.model, state)
        found = targets(normed, head, self.fitness.chunk_bytes // self.forward.workers.count).to("cpu")
        if not bool(torch.isfinite(found.normaliser).all()):
            raise InputError("what the dense model predicts is not finite; check its weights, or use dtype=float32")
        return found
