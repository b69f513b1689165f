"""Magnitude by members: a head or neuron counts as much as its parameters are large.

The score of a member is the L2 norm of all parameters that go with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.shared.members import SurveyedPruner, member_layers, sum_by_member
from local_prune.pruner import Calibration, Track
from supernet.models.architecture import SubBlock


def magnitudes(part: SubBlock) -> Tensor:
    """L2 norm of all parameters that go with a member: its rows with their biases, and its columns.

    Returns:
        (members,) float32.
    """
    squares = {layer: part.weight(layer).detach().float().square() for layer in member_layers(part)}
    biases = {layer: bias for layer in member_layers(part) if (bias := part.bias(layer)) is not None}
    bias_squares = {layer: bias.detach().float().square() for layer, bias in biases.items()}
    return sum_by_member(part, squares, bias_squares).sqrt()


@dataclass(frozen=True)
class MagnitudeMembersPruner(SurveyedPruner):
    """Members with the smallest parameters go first: `prune=magnitude_sp`."""

    name: ClassVar[str] = "magnitude_sp"
    version: ClassVar[int] = 1

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """The norms of the dense model's members, by unit; the text plays no part."""
        return {part.name: magnitudes(part) for part in self.parts(model) if part.groups is not None}
