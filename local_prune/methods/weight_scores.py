"""Unstructured and N:M pruning of linear layers by a score of each weight; the weights that stay keep their dense
values.

Magnitude (Han et al. 2015), Wanda (Sun et al. 2023, section 3) and GBLM-Pruner (Das et al. 2023, section 3.2) differ in
the score alone. A score gives an order of removal, and a level keeps the end of it, so levels are nested. Pure
functions over tensors; W is (d_out, d_in) as in a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, NoSurvey, Task, Track
from local_prune.statistics import LeastSquares, Moments, check_number
from local_prune.text.gradients import COST, weight_gradient_norms
from supernet.encodings.encoding import Candidate, Weights
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Pattern, Prunable, weight_prunables

PAIRS = 1 << 24  # of scores that are compared at a time: bounds the working memory to about 64 MiB


def ascending(scores: Tensor) -> Tensor:
    """The stable order of the flattened scores, smallest first, ties by index: (n,) int64.

    Args:
        scores: Finite float32 or float64, without a negative zero; of negative numbers only one value, that sorts
            first.
    """
    bits = scores.flatten().view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    return bits.argsort(stable=True)  # floats sort as their bits do, and integers by radix: ten times as fast on CPUs


def positions(order: Tensor) -> Tensor:
    """Where each index stands in an order: its inverse permutation, (n,) int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def rank_in_layer(scores: Tensor) -> Tensor:
    """How many weights of the layer go before each: (d_out, d_in) int64, each number once, the least score 0."""
    return positions(ascending(scores)).view(scores.shape)


def rank_in_rows(scores: Tensor) -> Tensor:
    """As `rank_in_layer`, with every row losing its next weight before any row loses another: rows keep equal numbers,
    +-1.
    """
    d_out, d_in = scores.shape
    order = scores.argsort(dim=1, stable=True)
    steps = torch.arange(d_in, device=scores.device).expand(d_out, d_in)
    in_row = torch.empty_like(order).scatter_(1, order, steps)
    return in_row * d_out + torch.arange(d_out, device=scores.device).unsqueeze(1)


def rank_in_groups(scores: Tensor, dim: int) -> Tensor:
    """How many of the others along `dim` are smaller; of equal ones the first ranks lower. int64, shaped as the scores.

    For the groups of N:M: comparing all pairs beats sorting where there are few to a group and many groups.
    """
    # dim is that of the others, dim + 1 that of the ranked
    mine, other = (scores.unsqueeze(dim), scores.unsqueeze(dim + 1))
    size = scores.shape[dim]
    index = torch.arange(size, device=scores.device)
    earlier = (index.unsqueeze(1) < index).view(size, size, *[1] * (scores.dim() - dim - 1))
    before: Tensor = (other < mine) | ((other == mine) & earlier)
    return before.sum(dim)


def patterned_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The best `keep` of every `of` neighbouring inputs of an output: (d_out, d_in) bool."""
    groups = scores.reshape(-1, pattern.of)
    parts = groups.split(max(1, PAIRS // pattern.of**2))
    return torch.cat([rank_in_groups(part, 1) >= pattern.of - pattern.keep for part in parts]).view(scores.shape)


def parse_patterns(pattern: str | Sequence[str] | None) -> tuple[Pattern, ...]:
    """The patterns of a setting, none where it is None; InputError unless each keeps another share of the weights."""
    texts = [] if pattern is None else [pattern] if isinstance(pattern, str | int) else list(pattern)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(
                f'prune.pruner.pattern={text} is a number; quote patterns, YAML reads 2:4 as one: pattern="2:4"'
            )
    if pattern is not None and not texts:
        raise InputError(
            'prune.pruner.pattern=[] names no pattern; leave it null for unstructured, or give one such as "2:4"'
        )
    patterns = tuple(Pattern.parse(text) for text in texts)
    if len({one.keep / one.of for one in patterns}) < len(patterns):
        raise InputError(
            f"prune.pruner.pattern={','.join(texts)} has two patterns of the same density; leave one of them out"
        )
    return patterns


def pattern_of(kept: int, weights: int, patterns: Sequence[Pattern]) -> Pattern:
    """The pattern that keeps so many of so many weights."""
    for pattern in patterns:
        if pattern.kept(weights) == kept:
            return pattern
    raise InputError(
        f"no N:M pattern of prune.pruner.pattern keeps {kept} of {weights} weights; use the levels of the patterns"
    )


@dataclass(frozen=True)
class WeightPruner(NoSurvey):
    """What pruners of single weights share.

    Attributes:
        pattern: None for unstructured; "2:4", or several such as ["3:4", "2:4"], each of which is a level.
    """

    pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        parse_patterns(self.pattern)

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """Parsed; empty for unstructured."""
        return parse_patterns(self.pattern)

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """Every linear layer of the sub-blocks."""
        return weight_prunables(parts, self.patterns)


@dataclass(frozen=True)
class ScoredPruner(WeightPruner):
    """Pruners that choose by a score of each weight; subclasses say which."""

    def scores(self, task: Task) -> Tensor:
        """(d_out, d_in) float32, not negative; a tensor of its own, which will be changed."""
        raise NotImplementedError

    def rank(self, scores: Tensor) -> Tensor:
        """Order of removal in the unstructured case: compared within the rows."""
        return rank_in_rows(scores)

    def statistics(self, dense: Tensor, width: int) -> LeastSquares | Moments | None:
        """The norms of the inputs, taken from their moments."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One candidate a level, without weights; see `Pruner.candidates`."""
        if not kept:
            return []
        scores = self.scores(task).contiguous()  # dense weights may be transposed
        scores.masked_fill_(task.dense == 0, -1.0)  # before those whose inputs are 0: what is zero already goes first
        if self.patterns:
            return [Weights(patterned_mask(scores, pattern_of(k, scores.numel(), self.patterns)), None) for k in kept]
        rank = self.rank(scores)
        return [Weights(rank >= rank.numel() - count, None) for count in kept]


@dataclass(frozen=True)
class MagnitudePruner(ScoredPruner):
    """|W|, compared over the whole layer: `prune=magnitude`."""

    name: ClassVar[str] = "magnitude"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij|."""
        return task.dense.float().abs()

    def rank(self, scores: Tensor) -> Tensor:
        """Order of removal in the unstructured case: compared over the whole layer."""
        return rank_in_layer(scores)

    def statistics(self, dense: Tensor, width: int) -> LeastSquares | Moments | None:
        """None: the inputs do not matter."""
        return None


@dataclass(frozen=True)
class WandaPruner(ScoredPruner):
    """|W_ij| ||X_j||_2, compared per output (Sun et al. 2023, equation 1): `prune=wanda`."""

    name: ClassVar[str] = "wanda"
    version: ClassVar[int] = 1

    def scores(self, task: Task) -> Tensor:
        """|W_ij| ||X_j||_2."""
        return task.dense.float().abs() * _norms(task)


@dataclass(frozen=True)
class GblmPruner(ScoredPruner):
    """|W_ij| ||X_j||_2 + `gradient_weight` |W_ij| |g_ij|, compared per output (Das et al. 2023, section 3.2):
    `prune=gblm`.

    ||X_j||_2 is the root of the mean over the calibration sequences of the squared norm over their tokens, see
    `survey`.

    Attributes:
        gradient_weight: The paper's alpha: activations and gradients differ in size.
        norm: g is the l1 (1) or l2 (2) norm of the gradients of the loss over the calibration sequences.
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
        """See `Pruner`."""
        return COST * calibration.ids.numel()

    def scores(self, task: Task) -> Tensor:
        """|W_ij| (||X_j||_2 + gradient_weight |g_ij|), times the root of the number of sequences."""
        if task.scores is None:
            raise InputError(f"{task.where}: gblm needs the gradients of its survey, and there are none for this layer")
        gradients = task.scores.to(task.dense.device).float()
        if not bool(torch.isfinite(gradients).all()):
            raise InputError(f"{task.where}: gradients are not finite; check the model's weights, or use dtype=float32")
        return task.dense.float().abs() * (_norms(task) + self.gradient_weight * gradients)


def _norms(task: Task) -> Tensor:
    assert isinstance(task.statistics, Moments)
    norms = task.statistics.norms
    if not bool(torch.isfinite(norms).all()):
        raise InputError(f"{task.where}: activations are not finite; check the model's weights, or use dtype=float32")
    return norms
