"""What pruners of single weights share: their units, N:M patterns, and candidates from a score of each weight.

A score gives an order of removal, and a level keeps the end of it, so levels are nested. W is (d_out, d_in) as in a
linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from local_prune.methods.shared.ranking import rank_in_groups, rank_in_rows
from local_prune.pruner import NoSurvey, Statistics, Task
from local_prune.statistics import Moments, finite
from supernet.candidates import Candidate, Weights
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Pattern, Prunable, weight_prunables

PAIRS = 1 << 24  # of scores that are compared at a time: bounds the working memory to about 64 MiB


def patterned_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep the best `keep` of every `of` neighbouring inputs of an output: (d_out, d_in) bool, True where one stays."""
    groups = scores.reshape(-1, pattern.of)
    parts = groups.split(max(1, PAIRS // pattern.of**2))
    return torch.cat([rank_in_groups(part, 1) >= pattern.of - pattern.keep for part in parts]).view(scores.shape)


def parse_patterns(pattern: str | Sequence[str] | None) -> tuple[Pattern, ...]:
    """The patterns that a setting names, none where it is None.

    Raises:
        InputError: One is no pattern, or two keep the same share of the weights.
    """
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
    """The pattern that keeps `kept` of a layer's weights; InputError where none does."""
    for pattern in patterns:
        if pattern.kept(weights) == kept:
            return pattern
    raise InputError(
        f"no N:M pattern of prune.pruner.pattern keeps {kept} of {weights} weights; use the levels of the patterns"
    )


@dataclass(frozen=True)
class WeightPruner(NoSurvey):
    """What all pruners of single weights have in common: their units are linear layers.

    Attributes:
        pattern: None for unstructured; "2:4", or several such as ["3:4", "2:4"], each of which is a level.
    """

    pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        parse_patterns(self.pattern)

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns that `pattern` names; none for unstructured."""
        return parse_patterns(self.pattern)

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """Every linear layer of the sub-blocks."""
        return weight_prunables(parts, self.patterns)


@dataclass(frozen=True)
class ScoredPruner(WeightPruner):
    """A method that keeps the weights with the highest scores, as they are. A subclass says what the scores are."""

    def scores(self, task: Task) -> Tensor:
        """What each weight is worth, (d_out, d_in) float32 and not negative: a new tensor, which will be changed."""
        raise NotImplementedError

    def rank(self, scores: Tensor) -> Tensor:
        """How many weights go before each, (d_out, d_in) int64; unstructured, weights of one output are compared."""
        return rank_in_rows(scores)

    def statistics(self, dense: Tensor, width: int) -> Statistics | None:
        """The norms of the inputs are taken from their moments."""
        return Moments.zeros(dense.shape[1], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One candidate a level, without weights."""
        if not kept:
            return []
        scores = self.scores(task).contiguous()  # dense weights may be transposed
        scores.masked_fill_(task.dense == 0, -1.0)  # what is zero already goes first, before weights of dead inputs
        if self.patterns:
            return [Weights(patterned_mask(scores, pattern_of(k, scores.numel(), self.patterns)), None) for k in kept]
        rank = self.rank(scores)
        return [Weights(rank >= rank.numel() - count, None) for count in kept]


def input_norms(task: Task) -> Tensor:
    """||X_j||_2 of each input of the layer, (d_in,) float32; InputError where one is not finite."""
    assert isinstance(task.statistics, Moments)
    return finite(task.statistics.norms, task.where)
