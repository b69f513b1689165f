"""Structured pruning by scores: members with the lowest ones go first, and the weights of the others stay as they are.

One order serves all levels, so that they are nested. Pure functions over tensors, W (d_out, d_in) and X (tokens, d_in),
give a score a member, of `width` neighbouring input columns; a thin class a method makes candidates of them.

FLAP also standardises its scores, so that those of all layers can be sorted into one global allocation. Here they are
compared within a unit alone: how much of each unit stays is what the search finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.members import Projected, best, finite, member_layers, sum_by_member
from local_prune.pruner import Calibration, NoSurvey, Task, Track
from local_prune.statistics import Moments
from local_prune.text.gradients import COST, member_saliencies
from supernet.encodings.encoding import Candidate, Members, member_columns
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, by_query_heads, sub_blocks
from supernet.models.prunables import Prunable, member_prunables


def magnitudes(part: SubBlock) -> Tensor:
    """L2 norm of all parameters that go with a member, its rows with their biases and its columns: (members,)
    float32.
    """
    squares = {layer: part.weight(layer).detach().float().square() for layer in member_layers(part)}
    biases = {layer: bias for layer in member_layers(part) if (bias := part.bias(layer)) is not None}
    return sum_by_member(
        part, squares, {layer: bias.detach().float().square() for layer, bias in biases.items()}
    ).sqrt()


def wanda_sp(dense: Tensor, norms: Tensor, width: int) -> Tensor:
    """Wanda's |W_ij| ||X_j||_2 by members (Wanda-sp, a baseline of FLAP, An et al. 2024).

    The mean over the outputs and over the columns of a member, as in FLAP's code.

    Args:
        dense: (d_out, d_in).
        norms: ||X_j||_2, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    return (dense.detach().float().abs().mean(0) * norms).view(-1, width).mean(1)


def fluctuation(dense: Tensor, variance: Tensor, width: int) -> Tensor:
    """FLAP's weighted input feature variance, Var(x_j) ||W_:j||^2 (An et al. 2024, WIFV): what a bias cannot make up
    for.

    The root mean square over the columns of a member. The authors' code takes the mean of the squares for heads, which
    is the same order, and the variance itself for neurons, which is the root of its square.

    Args:
        dense: (d_out, d_in).
        variance: Of each input over the tokens, (d_in,).
        width: Columns per member.

    Returns:
        (d_in / width,) float32.
    """
    metric = dense.detach().float().square().sum(0) * variance
    return metric.double().view(-1, width).square().mean(1).sqrt().float()  # squares of small float32 numbers may be 0


def compensation(dense: Tensor, bias: Tensor | None, mean: Tensor, kept: Tensor, width: int) -> Tensor:
    """The bias with which the mean output stays that of the dense layer (FLAP, An et al. 2024).

    Args:
        dense: (d_out, d_in).
        bias: (d_out,) of the dense layer, or None.
        mean: Of each input over the tokens, (d_in,).
        kept: (k,) members.
        width: Columns per member.

    Returns:
        (d_out,) in the dtype of `dense`.
    """
    removed = mean.index_fill(0, member_columns(kept, width), 0.0)
    output = dense.detach().float() @ removed
    return (output if bias is None else output + bias.detach().float()).to(dense.dtype)


@dataclass(frozen=True)
class MembersPruner(NoSurvey):
    """What the methods have in common.

    Attributes:
        multiple: Kept neurons are multiples of this.
        query_heads: Take single query heads (Týr-the-Pruner) instead of KV groups.
    """

    multiple: int = 32
    query_heads: bool = False

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """See `Pruner`."""
        return member_prunables(parts, self.multiple, self.query_heads)

    def parts(self, model: PreTrainedModel) -> tuple[SubBlock, ...]:
        """The model's sub-blocks, with the members that are asked for."""
        return by_query_heads(sub_blocks(model)) if self.query_heads else sub_blocks(model)


@dataclass(frozen=True)
class SurveyedPruner(MembersPruner):
    """A method whose scores all come from its survey."""

    def statistics(self, dense: Tensor, width: int) -> None:
        """None: the inputs of the pruned model play no part."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        if task.scores is None:
            raise InputError(f"{task.where}: the survey of the dense model has no scores for this unit")
        scores = finite(task.scores.to(task.dense.device), task.where, "weights, or the gradients of the survey,")
        return [Members(members, None) for members in best(scores, kept)]


@dataclass(frozen=True)
class MagnitudeMembersPruner(SurveyedPruner):
    """Members with the smallest parameters go first: `magnitudes`."""

    name: ClassVar[str] = "magnitude_sp"
    version: ClassVar[int] = 1

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """Scores from the weights alone."""
        return {part.name: magnitudes(part) for part in self.parts(model) if part.groups is not None}


@dataclass(frozen=True)
class TaylorPruner(SurveyedPruner):
    """Members with the smallest first-order effect on the loss go first: LLM-Pruner, see `member_saliencies`."""

    name: ClassVar[str] = "taylor"
    version: ClassVar[int] = 1

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """Scores from the gradient of the loss on the calibration text."""
        return member_saliencies(model, self.parts(model), calibration, device, track)

    def survey_tokens(self, calibration: Calibration) -> int:
        """See `Pruner`."""
        return COST * calibration.ids.numel()


@dataclass(frozen=True)
class WandaSpPruner(MembersPruner):
    """Members with the smallest weights times inputs go first: `wanda_sp`."""

    name: ClassVar[str] = "wanda_sp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """Of each input."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        assert isinstance(task.statistics, Moments)
        scores = finite(wanda_sp(task.dense, task.statistics.norms, task.width), task.where)
        return [Members(members, None) for members in best(scores, kept)]


@dataclass(frozen=True)
class FlapPruner(MembersPruner):
    """Members whose output varies least go first, and a bias takes the place of its mean: `fluctuation` and
    `compensation`.

    Attributes:
        compensate: Whether candidates have that bias.
    """

    name: ClassVar[str] = "flap"
    version: ClassVar[int] = 1

    compensate: bool = True

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """See `Pruner`; a bias is paid for."""
        return member_prunables(parts, self.multiple, self.query_heads, self.compensate)

    def statistics(self, dense: Tensor, width: int) -> Moments:
        """Of each input."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights. A level of no members is an absent sub-block and has no bias either."""
        assert isinstance(task.statistics, Moments)
        scores = finite(fluctuation(task.dense, task.statistics.variance, task.width), task.where)
        mean = finite(task.statistics.mean, task.where)
        candidates: list[Candidate] = []
        for members in best(scores, kept):
            bias = None
            if self.compensate and len(members):
                bias = compensation(task.dense, task.bias, mean, members, task.width)
            candidates.append(Members(members, None, bias))
        return candidates


@dataclass(frozen=True)
class AmpPruner(MembersPruner):
    """Members that put the least into the output go first: AMP (attention heads and MLP pruning), see `Projected`."""

    name: ClassVar[str] = "amp"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> Projected:
        """Of each member's output."""
        return Projected.zeros(dense, width)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        assert isinstance(task.statistics, Projected)
        return [Members(members, None) for members in best(finite(task.statistics.mean, task.where), kept)]
