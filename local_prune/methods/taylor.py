"""LLM-Pruner (Ma et al. 2023, section 3.2): members whose removal changes the loss least, to first order, go first.

The score of a member is sum |g w| over the weights w that go with it, with g the gradient of the loss on the whole
calibration text: the authors' importance by elements of weights (`param_first`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.shared.members import SurveyedPruner, member_layers, sum_by_member
from local_prune.pruner import Calibration, Track
from local_prune.text.gradients import COST, add_on_cpu, gradients
from supernet.models.architecture import SubBlock


def member_saliencies(
    model: PreTrainedModel, parts: Sequence[SubBlock], calibration: Calibration, device: torch.device, track: Track
) -> dict[str, Tensor]:
    """First-order importance of each member: sum |g w| over its rows and its columns.

    g is the gradient of the mean loss over the whole calibration text, so it has to be summed over all batches before
    the absolute value is taken. That takes the memory of one float32 copy of those layers. Biases are left out, as in
    the authors' code.

    Args:
        model: The dense model.
        parts: Its sub-blocks, with the members asked for.
        calibration: Its text.
        device: Where the block at work lies.
        track: Draws progress.

    Returns:
        Name of the sub-block -> (members,) float32 on the CPU, for those that have members.
    """
    totals: dict[str, Tensor] = {}
    layers = {part.name: member_layers(part) for part in parts}
    for ids in track(calibration.ids.split(calibration.batch), "gradients"):
        share = len(ids) / len(calibration.ids)

        def visit(part: SubBlock, found: Mapping[str, Tensor], share: float = share) -> None:
            for layer in layers[part.name]:
                add_on_cpu(totals, f"{part.name}.{layer}", found[layer] * share)

        gradients(model, ids, device, visit, calibration.unscored)
    return {part.name: _saliency(part, totals) for part in parts if part.groups is not None}


def _saliency(part: SubBlock, totals: dict[str, Tensor]) -> Tensor:
    """The importance of one sub-block's members; its gradients are taken out of `totals`."""
    products = {}
    for layer in member_layers(part):
        weight = part.weight(layer).detach().to("cpu", torch.float32)
        products[layer] = totals.pop(f"{part.name}.{layer}").mul_(weight).abs_()
    return sum_by_member(part, products)


@dataclass(frozen=True)
class TaylorPruner(SurveyedPruner):
    """Members with the smallest first-order effect on the loss go first: `prune=taylor`."""

    name: ClassVar[str] = "taylor"
    version: ClassVar[int] = 1

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """The importance of the dense model's members, by unit."""
        return member_saliencies(model, self.parts(model), calibration, device, track)

    def survey_tokens(self, calibration: Calibration) -> int:
        """One gradient of the whole text."""
        return COST * calibration.ids.numel()

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """A float32 number for each weight of the layers that lose rows or columns."""
        return sum(4 * part.weight(layer).numel() for part in parts for layer in member_layers(part))
