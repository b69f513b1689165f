"""Measures perplexity and KL divergence of the dense, the uniform and the searched model on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluation.fitness import CrossEntropy, KlDivergence, kl_divergence, negative_log_likelihood, targets
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.resources import Resources
from search.evaluation.teacher import TeacherTargets
from supernet.models.architecture import nonzero_count, parameter_count
from supernet.models.forward import head_of
from supernet.space import Allocation
from supernet.store import Supernet

Track = Callable[[Sequence[Tensor], str], Iterable[Tensor]]


@dataclass(frozen=True)
class Metrics:
    """What was measured of a model on held-out text.

    Attributes:
        parameters: The number of parameters of the whole model; tied ones count once.
        nonzero: How many of them are not zero.
        losses: The mean -log p of a token in each sequence, (sequences,) float64. The leading special tokens are left
            out and, where there are none, the first token is (sequences do not overlap).
        divergences: The mean KL divergence to the dense model at a token of each sequence, (sequences,) float64.
            Positions that predict a leading special token are left out. A mean may be a little below 0, by rounding.
    """

    parameters: int
    nonzero: int
    losses: np.ndarray
    divergences: np.ndarray

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss; infinite where that is too large for a float."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.losses.mean()))

    @property
    def kl_divergence(self) -> float:
        """The mean KL divergence to the dense model."""
        return float(self.divergences.mean())

    def to_json(self) -> dict[str, Any]:
        """Return the model's entry in `metrics.json`, where `*_error` are standard errors over sequences.

        Errors are null for a single sequence, and where a loss is not finite. The perplexity's error is to first order:
        the perplexity times the error of the mean loss.
        """
        of_loss = error_of_mean(self.losses)
        return {
            "parameters": self.parameters,
            "nonzero_parameters": self.nonzero,
            "perplexity": self.perplexity,
            "perplexity_error": None if of_loss is None else self.perplexity * of_loss,
            "kl_divergence": self.kl_divergence,
            "kl_divergence_error": error_of_mean(self.divergences),
        }


def difference(a: Metrics, b: Metrics) -> dict[str, Any]:
    """Return by how much model `a` is worse than model `b` on the same sequences, with paired standard errors."""
    found: dict[str, Any] = {}
    for name, one, other in (("kl_divergence", a.divergences, b.divergences), ("log_perplexity", a.losses, b.losses)):
        with np.errstate(invalid="ignore"):  # the difference of two infinite losses is NaN, without a warning
            found |= {name: float((one - other).mean()), f"{name}_error": error_of_mean(one - other)}
    return found


def error_of_mean(values: np.ndarray) -> float | None:
    """Return the standard error of the mean of values; None for a single value, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / len(values) ** 0.5)


class HeldOut:
    """Holds held-out text and the dense model's targets on it, which other models are measured against."""

    def __init__(
        self,
        dense: PreTrainedModel,
        ids: Tensor,
        batch: int,
        track: Track,
        unscored: int = 0,
        targets: TeacherTargets | None = None,
    ) -> None:
        """Run the dense model once, and keep its targets.

        Args:
            dense: The dense model.
            ids: (sequences, tokens) int64.
            batch: How many sequences pass through a model together.
            track: Draws progress over a sequence of batches.
            unscored: First positions of each sequence that are left out, as they predict tokens that always begin a
                sequence.
            targets: An empty store for the dense model's targets, by the number of their batch; None makes one with
                the defaults of `Resources`.
        """
        self.batches, self.unscored = ids.split(batch), unscored
        self.track = track
        self.targets = Resources().teacher_targets() if targets is None else targets
        self.dense = self.measure(dense, "dense")

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, title: str) -> Metrics:
        """Measure a model; progress shows `title`.

        The first one must be the dense model, whose targets are kept; its divergence to itself is 0.
        """
        head = head_of(model)
        losses, divergences = list[Tensor](), list[Tensor]()
        for index, ids in enumerate(self.track(self.batches, f"{title} model on held-out text")):
            hidden, ids = _hidden(model, ids)[:, self.unscored :], ids[:, self.unscored :]
            flat = hidden.flatten(0, 1)
            losses.append(negative_log_likelihood(hidden, head, ids.to(hidden.device)).double().mean(1))
            if index in self.targets:
                divergence = kl_divergence(flat.unsqueeze(0), head, self.targets[index].to(hidden.device))
            else:
                self.targets.add(index, targets(flat, head))
                divergence = torch.zeros(len(flat))
            divergences.append(divergence.view(len(ids), -1).double().mean(1))
        of_sequences = [torch.cat(of_all).cpu().numpy() for of_all in (losses, divergences)]
        return Metrics(parameter_count(model), nonzero_count(model), *of_sequences)


def streamed(
    model: PreTrainedModel,
    supernet: Supernet,
    allocation: Allocation,
    ids: Tensor,
    resources: Resources,
    counted: PreTrainedModel,
    unscored: int = 0,
) -> Metrics:
    """Measure an allocation block by block, as the search does, so that its model need not fit on the device.

    Args:
        model: The dense model.
        supernet: The candidates of its units.
        allocation: One level for each unit.
        ids: (sequences, tokens) int64, the held-out text.
        resources: The device, where the model lies, and how much memory may be taken.
        counted: The allocation's assembled model, which is not run: its parameters are counted.
        unscored: First positions of each sequence that are left out.
    """
    every = np.arange(len(ids))
    with closing(GenerationEvaluator(model, supernet, ids, KlDivergence(), resources, unscored)) as evaluate:
        divergences = evaluate([allocation], every)[0]
        evaluate.use(CrossEntropy())  # with the same targets
        return Metrics(parameter_count(counted), nonzero_count(counted), evaluate([allocation], every)[0], divergences)


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the final hidden states (batch, tokens, hidden), behind the last norm."""
    output = model.base_model(input_ids=ids.to(model.device), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
