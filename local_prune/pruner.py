"""The seam between the walk and the methods: what a method is asked for, and what it is given."""

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
    """Sums over the calibration tokens of what a layer gets as inputs."""

    def add(self, inputs: Tensor) -> None:
        """Add a batch: X (tokens, d_in), of any float dtype."""
        ...

    def merge(self, other: Self) -> None:
        """Add the sums over other tokens, which another process or thread has added up for the same layer.

        Called, if at all, when all batches have been added, and before candidates are made.
        """
        ...


@dataclass(frozen=True)
class Calibration:
    """How the calibration text is used.

    Attributes:
        ids: (sequences, tokens) int64.
        batch: Sequences in one forward pass.
        fit: What the kept weights are fitted to: `pruned`, the dense layer's output on the inputs of the pruned model;
            `dense`, its output on the inputs of the dense model; `residual`, the dense model's whole residual stream
            behind the sub-block, so that each fit also makes up for the error that came before it. Layers that do not
            end a sub-block are fitted as `pruned`, and so are those that do where a norm stands between them and the
            stream (the Gemmas).
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
    """One unit to be pruned.

    Attributes:
        where: Name of the unit, for messages.
        dense: (d_out, d_in) weight of the linear layer at work; for structured units the layer that loses input
            columns.
        statistics: Sums over the calibration tokens, from the object that `Pruner.statistics` made.
        scores: What `Pruner.survey` found for the unit: (members,) structured, (d_out, d_in) unstructured.
        width: Input columns per member; 1 except for heads.
        bias: (d_out,) of the layer, if it has one.
    """

    where: str
    dense: Tensor
    statistics: Statistics | None = None
    scores: Tensor | None = None
    width: int = 1
    bias: Tensor | None = None


class NoSurvey:
    """What methods inherit that need nothing from the dense model as a whole."""

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """No scores."""
        return {}

    def survey_tokens(self, calibration: Calibration) -> int:
        """No tokens."""
        return 0

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """No bytes worth a word; a survey that keeps gradients says how many."""
        return 0


class Pruner(Protocol):
    """A local pruning method. `_target_` of `prune.pruner` in the configuration.

    Attributes:
        name: What the method is called on disk, whatever its class is called and wherever that lies; it never changes.
        version: Raised by one whenever the same settings would give other candidates, so that supernets that were built
            before are not taken for new ones. `tests/local_prune/methods/test_golden.py` fails where that was
            forgotten.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """The units that the method prunes, in the order of the forward pass."""
        ...

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """Scores by unit that are taken from the dense model as a whole before the walk, on `device`; empty for most
        methods.
        """
        ...

    def survey_tokens(self, calibration: Calibration) -> int:
        """About how many forward tokens the survey costs (a backward pass counts as two); 0 where there is none."""
        ...

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """Bytes in main memory that the survey of a model with these sub-blocks keeps; 0 where they are few."""
        ...

    def statistics(self, dense: Tensor, width: int) -> Statistics | None:
        """A fresh accumulator for the inputs of a layer of weight (d_out, d_in); None where the method looks at no
        inputs.

        Layers with the same inputs (queries, keys and values; gate and up) share one, with their weights stacked as
        `dense`.
        """
        ...

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """The candidates of one unit.

        Args:
            task: The unit.
            kept: What each level keeps, falling, without the dense level: members, weights, or bits.

        Returns:
            One candidate a level.
        """
        ...
