"""Perplexity and KL divergence on held-out text: of the dense, the uniform and the searched model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.fitness import Targets, kl_divergence, negative_log_likelihood, targets
from supernet.architecture import parameter_count

Track = Callable[[Sequence[Tensor], str], Iterable[Tensor]]


@dataclass(frozen=True)
class Metrics:
    """A model on held-out text.

    Attributes:
        parameters: Of the whole model, tied ones once.
        perplexity: Of every token but the first of each window (windows do not overlap).
        kl_divergence: To the dense model, mean a token.
    """

    parameters: int
    perplexity: float
    kl_divergence: float

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)


@torch.no_grad()
def teacher_targets(model: PreTrainedModel, ids: Tensor, batch: int, track: Track) -> list[Targets]:
    """The dense model's targets for each batch of ids (sequences, tokens)."""
    head = _head(model)
    return [targets(_hidden(model, rows).flatten(0, 1), head) for rows in track(ids.split(batch), "dense model on held-out text")]


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Tensor, teacher: Sequence[Targets], batch: int, title: str, track: Track) -> Metrics:
    """Metrics of a model on ids (sequences, tokens), against the targets of the same batches."""
    head = _head(model)
    loss = divergence = 0.0
    for rows, target in zip(track(ids.split(batch), f"{title} model on held-out text"), teacher, strict=True):
        hidden = _hidden(model, rows)
        loss += float(negative_log_likelihood(hidden, head, rows.to(hidden.device)).double().sum())
        divergence += float(kl_divergence(hidden.flatten(0, 1), head, target).double().sum())
    predicted = len(ids) * (ids.shape[1] - 1)
    return Metrics(parameter_count(model), math.exp(loss / predicted), divergence / ids.numel())


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states (batch, tokens, hidden), behind the last norm."""
    output = model.base_model(input_ids=ids.to(model.device), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _head(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head
