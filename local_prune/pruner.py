"""The interface between the walk through the model and the pruning methods.

A method implements `Pruner`. `local_prune.walk` calls it, hands it a `Task` for each unit, and stores the candidates
that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.candidates import Candidate
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # draws progress over a sequence with a title

FITS = ("pruned", "dense", "residual")


class Statistics(Protocol):
    """Sums over the calibration tokens, taken of a layer's inputs."""

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs X (tokens, d_in), of any float dtype. Called once for each batch of text."""
        ...

    def merge(self, other: Self) -> None:
        """Add the sums over other tokens, which another process or thread has added up for the same layer.

        Called, if at all, after all batches have been added and before candidates are made.
        """
        ...


@dataclass(frozen=True)
class Calibration:
    """How the calibration text is used.

    Attributes:
        ids: (sequences, tokens) int64.
        batch: How many sequences pass through the model together.
        fit: What the kept weights are fitted to. With `pruned` it is the dense layer's output on the inputs of the
            pruned model; with `dense` its output on the inputs of the dense model; with `residual` the dense model's
            whole residual stream behind the sub-block, so that each fit also makes up for the error that came before
            it. With `residual`, layers that do not end a sub-block are fitted as with `pruned`, and so are those that
            end one where a norm stands between them and the stream (the Gemmas).
        unscored: First positions of each sequence that losses leave out, as they predict tokens that always begin a
            sequence. Statistics of activations take all tokens: that is how the model is used.
    """

    ids: Tensor
    batch: int = 4
    fit: str = "pruned"
    unscored: int = 0

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InputError(f"prune.fit={self.fit} is not known; choose one of {', '.join(FITS)}")
        if self.batch < 1:
            raise InputError(f"prune.batch={self.batch} must be at least 1 sequence")


@dataclass(frozen=True)
class Task:
    """One unit to be pruned, and what is known about it.

    Attributes:
        where: The name of the unit, for messages.
        dense: (d_out, d_in), the dense weight of the linear layer at work; for structured units that is the layer that
            loses input columns.
        statistics: The sums over the calibration tokens, in the object that `Pruner.statistics` made; None for methods
            that look at no inputs.
        scores: What `Pruner.survey` found for the unit, if anything: (members,) for structured units, (d_out, d_in)
            for unstructured ones.
        width: How many input columns a member has; 1 except for heads.
        bias: (d_out,), the bias of the layer; None if it has none.
    """

    where: str
    dense: Tensor
    statistics: Statistics | None = None
    scores: Tensor | None = None
    width: int = 1
    bias: Tensor | None = None


class NoSurvey:
    """The base class of methods that need nothing from the dense model as a whole: their survey is empty."""

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """Return no scores."""
        return {}

    def survey_tokens(self, calibration: Calibration) -> int:
        """Return 0: no tokens are passed."""
        return 0

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """Return 0; only surveys that keep something large, such as gradients, say more."""
        return 0


class Pruner(Protocol):
    """A local pruning method. The configuration names its class as the `_target_` of `prune.pruner`.

    Attributes:
        name: What the method is called on disk. It never changes, even if the class is renamed or moved.
        version: A number that is raised by one whenever the same settings would give other candidates, so that a
            supernet that was built before is not taken for a new one. `tests/local_prune/methods/test_golden.py` fails
            where that was forgotten.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """Return the units that the method prunes, in the order of the forward pass.

        Called before the levels are chosen, with all sub-blocks of the model.
        """
        ...

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """Return scores by the name of their unit, taken from the dense model as a whole; most methods have none.

        Called before the walk; work is done on `device`, and `track` draws progress. What it returns may be used by
        several builds on the same model and text. Each unit's scores come back in its `Task`.
        """
        ...

    def survey_tokens(self, calibration: Calibration) -> int:
        """Return about how many forward tokens the survey costs; 0 where there is none.

        A backward pass counts as two forward passes.
        """
        ...

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """Return how many bytes of main memory the survey of a model with these sub-blocks keeps; 0 where few."""
        ...

    def statistics(self, dense: Tensor, width: int) -> Statistics | None:
        """Return an empty accumulator for the inputs of layers; None where the method looks at no inputs.

        Called before the text passes. Layers with the same inputs (queries, keys and values; gate and up) share one.

        Args:
            dense: (d_out, d_in), the weight of the layer, or the stacked weights of layers that share their inputs.
            width: How many input columns a member has; 1 except for heads.
        """
        ...

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """Make the candidates of one unit. Called once for each unit, when its statistics are complete.

        Args:
            task: The unit.
            kept: How many members, weights or bits each level keeps, falling, without the dense level.

        Returns:
            One candidate for each of these levels.
        """
        ...
