"""Perplexity and KL divergence on held-out text: of the dense, the uniform and the searched model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluator import GenerationEvaluator, Resources
from search.fitness import CrossEntropy, KlDivergence, Targets, kl_divergence, negative_log_likelihood, targets
from supernet.architecture import head_of, parameter_count
from supernet.space import Allocation
from supernet.store import Supernet

Track = Callable[[Sequence[Tensor], str], Iterable[Tensor]]


@dataclass(frozen=True)
class Metrics:
    """A model on held-out text.

    Attributes:
        parameters: Of the whole model, tied ones once.
        perplexity: Of every token but the leading special ones and, without these, the first of each window (windows do not
            overlap).
        kl_divergence: To the dense model, mean a token; positions that predict a leading special token are left out.
    """

    parameters: int
    perplexity: float
    kl_divergence: float


class HeldOut:
    """Held-out text with the dense model's targets on it, which models are measured against."""

    def __init__(self, dense: PreTrainedModel, ids: Tensor, batch: int, track: Track, unscored: int = 0) -> None:
        """Run the dense model once.

        Args:
            dense: The dense model.
            ids: (sequences, tokens) int64.
            batch: Sequences in one forward pass.
            track: Draws progress.
            unscored: First positions of each sequence that are left out, as they predict tokens that always begin a sequence.
        """
        self.batches, self.unscored = ids.split(batch), unscored
        self.tokens = ids[:, unscored:].numel()
        self.predicted = self.tokens - len(ids)
        self.track = track
        self.targets: list[Targets] = []
        self.dense = self.measure(dense, "dense")

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, title: str) -> Metrics:
        """Metrics of a model. The first one measured is the dense one, which the others are compared with."""
        head = head_of(model)
        loss = divergence = 0.0
        for index, ids in enumerate(self.track(self.batches, f"{title} model on held-out text")):
            hidden, ids = _hidden(model, ids)[:, self.unscored :], ids[:, self.unscored :]
            if index == len(self.targets):
                self.targets.append(targets(hidden.flatten(0, 1), head))
            loss += float(negative_log_likelihood(hidden, head, ids.to(hidden.device)).double().sum())
            divergence += float(kl_divergence(hidden.flatten(0, 1).unsqueeze(0), head, self.targets[index]).double().sum())
        return Metrics(parameter_count(model), math.exp(loss / self.predicted), max(0.0, divergence / self.tokens))


def streamed(
    model: PreTrainedModel,
    supernet: Supernet,
    allocation: Allocation,
    ids: Tensor,
    resources: Resources,
    parameters: int,
    unscored: int = 0,
) -> Metrics:
    """Metrics of an allocation whose model need not fit on the device: measured as the search does, block by block.

    Args:
        model: The dense model.
        supernet: Candidates of its units.
        allocation: One of them for each unit.
        ids: (sequences, tokens) int64.
        resources: Where things lie.
        parameters: Of the allocation's model.
        unscored: As of `HeldOut`.
    """
    every = np.arange(len(ids))
    with closing(GenerationEvaluator(model, supernet, ids, KlDivergence(), resources, unscored)) as evaluate:
        divergence = evaluate([allocation], every).mean()
        evaluate.fitness = CrossEntropy()  # with the same targets
        loss = evaluate([allocation], every).mean()
    return Metrics(parameters, math.exp(loss), max(0.0, float(divergence)))


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states (batch, tokens, hidden), behind the last norm."""
    output = model.base_model(input_ids=ids.to(model.device), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
