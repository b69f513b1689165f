"""GBLM-Pruner (Das et al. 2023, section 3.2): Wanda's score plus the gradient of the loss at the weight.

The score is |W_ij| ||X_j||_2 + alpha |W_ij| |g_ij|, where g_ij is the l1 or l2 norm of the gradients of the calibration
sequences' losses. It is compared among the weights of one output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.shared.weights import ScoredPruner, input_norms
from local_prune.pruner import Calibration, Task, Track
from local_prune.statistics import check_number
from local_prune.text.gradients import COST, add_on_cpu, gradients
from supernet.errors import InputError
from supernet.models.architecture import SubBlock


def weight_gradient_norms(
    model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track, power: int
) -> dict[str, Tensor]:
    """Norm of each weight's gradient over the calibration sequences, |g_ij| in the paper.

    The loss of a sequence is its mean over tokens, and the sum over sequences is not divided by their number, as in the
    authors' code. Takes the memory of one float32 copy of the linear layers.

    Args:
        model: The dense model.
        calibration: Its text.
        device: Where the block at work lies.
        track: Draws progress.
        power: Which norm, 1 or 2.

    Returns:
        Name of the sub-block and of the layer, joined by a dot -> (d_out, d_in) float32 on the CPU.
    """
    if power not in (1, 2):
        raise InputError(
            f"the norm of the gradients over sequences is {power} but must be 1 or 2; 2 is the usual choice"
        )
    totals: dict[str, Tensor] = {}

    def visit(part: SubBlock, found: Mapping[str, Tensor]) -> None:
        for layer, gradient in found.items():
            add_on_cpu(totals, f"{part.name}.{layer}", gradient.abs() if power == 1 else gradient.square())

    for ids in track(calibration.ids.split(1), "gradients"):
        gradients(model, ids, device, visit, calibration.unscored)
    return totals if power == 1 else {name: total.sqrt_() for name, total in totals.items()}


@dataclass(frozen=True)
class GblmPruner(ScoredPruner):
    """Each output loses the weights with the smallest |W_ij| (||X_j||_2 + alpha |g_ij|): `prune=gblm`.

    Attributes:
        gradient_weight: The paper's alpha: activations and gradients differ in size.
        norm: Whether g is the l1 (1) or l2 (2) norm of the gradients over the calibration sequences.
    """

    name: ClassVar[str] = "gblm"
    version: ClassVar[int] = 1

    gradient_weight: float = 100.0
    norm: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gradient_weight", self.gradient_weight, "100", zero=True)
        if self.norm not in (1, 2):
            raise InputError(f"prune.pruner.norm={self.norm} must be 1 or 2, the norm over the sequences' gradients")

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """The norms g of every linear layer, by unit, times the root of the number of sequences.

        In the authors' code ||X_j||^2 is a mean over sequences, of sums over tokens, and g a sum over sequences.
        `Moments` knows tokens alone, so g is scaled instead: a factor common to all scores changes no order.
        """
        found = weight_gradient_norms(model, calibration, device, track, self.norm)
        return {name: norms.mul_(len(calibration.ids) ** 0.5) for name, norms in found.items()}

    def survey_tokens(self, calibration: Calibration) -> int:
        """One gradient of the whole text."""
        return COST * calibration.ids.numel()

    def survey_bytes(self, parts: Sequence[SubBlock]) -> int:
        """A float32 number for each weight of the linear layers."""
        return sum(4 * part.weight(layer).numel() for part in parts for stage in part.stages for layer in stage)

    def scores(self, task: Task) -> Tensor:
        """|W_ij| (||X_j||_2 + gradient_weight |g_ij|), times the root of the number of sequences."""
        if task.scores is None:
            raise InputError(f"{task.where}: gblm needs the gradients of its survey, and there are none for this layer")
        gradients = task.scores.to(task.dense.device).float()
        if not bool(torch.isfinite(gradients).all()):
            raise InputError(f"{task.where}: gradients are not finite; check the model's weights, or use dtype=float32")
        return task.dense.float().abs() * (input_norms(task) + self.gradient_weight * gradients)
