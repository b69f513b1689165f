"""FLAP (An et al. 2024): sorts all heads and neurons of a model by how much they fluctuate, and removes the lowest.

The metric of an input column j is Var(x_j) ||W_:,j||^2 (WIFV) or the mean over outputs of |W_ij| ||X_j||_2 (WIFN). It
is squared for attention, as in the authors' code (CASIA-IVA-Lab/FLAP, AL-AM), and standardised within its layer; the
score of a head is the mean over its columns.

Two things differ from that code. It counts a head as 512 / 3 neurons, while here each member counts what the budget
counts of it, whatever the model's sizes; a KV group and its query heads are one member. And single weights can be
sorted, too, by |W_ij| ||X_j||_2 (WIFN) or Var(x_j) W_ij^2 (WIFV), standardised within their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.statistics import Moments, finite
from local_prune.text.devices import on_device
from search.strategies.base import Dense, Problem
from search.strategies.checks import check_choice
from search.strategies.rules.base import (
    Rule,
    Site,
    dense_of,
    input_moments,
    sites,
    towards,
    unit_sizes,
    wrong_kind,
)
from supernet.models.architecture import blocks
from supernet.space import ATTENTION, BITS, WEIGHTS, Allocation, Space, Unit

METRICS = ("WIFV", "WIFN")
NEEDS = "heads, neurons and single weights"
ROWS = 1024  # how many rows of a weight are scored at a time
SHIFT = 12  # lowest bits of a float32 that bins of scores ignore: the others tell apart what differs by 1 / 2048
BINS = 1 << (31 - SHIFT)


@dataclass(frozen=True)
class Ranked:
    """The standardised scores of a unit's members.

    Attributes:
        scores: (n,) rising.
        counts: (n,) how many members have each score.
    """

    scores: np.ndarray
    counts: np.ndarray


def column_metric(W: Tensor, moments: Moments, metric: str) -> Tensor:
    """Return FLAP's metric of each input column, (d_in,) float64.

    Args:
        W: (d_out, d_in) weight.
        moments: The moments of the layer's inputs.
        metric: WIFV or WIFN.
    """
    if metric == "WIFV":
        return W.detach().double().square().sum(0) * moments.variance.double()
    return W.detach().double().abs().mean(0) * moments.norms.double()


def standardised(values: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation, (n,) float64; zeros if all values are alike."""
    deviation = values.std() if len(values) > 1 else values.new_zeros(())
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)


def rank_members(metric: Tensor, width: int, squared: bool) -> Ranked:
    """Rank members by the mean of their columns' standardised metric.

    Args:
        metric: (members * width,) metric of each column.
        width: How many columns a member has.
        squared: Whether to square the metric first, as FLAP does for attention.
    """
    scores = standardised(metric.square() if squared else metric).view(-1, width).mean(1).sort().values.cpu().numpy()
    return Ranked(scores, np.ones(len(scores)))


def weight_scores(W: Tensor, moments: Moments, metric: str) -> Iterator[Tensor]:
    """Yield the metric of single weights, a few rows (rows, d_in) float32 at a time.

    Args:
        W: (d_out, d_in) weight.
        moments: The moments of the layer's inputs.
        metric: WIFV or WIFN.
    """
    factor = moments.variance if metric == "WIFV" else moments.norms
    for rows in W.detach().split(ROWS):
        yield (rows.float().square() if metric == "WIFV" else rows.float().abs()) * factor


def rank_weights(pieces: Callable[[], Iterator[Tensor]]) -> Ranked:
    """Rank single weights by their standardised metric, in a histogram, as there are too many to sort.

    Floats that are not negative have the order of their bits, so their upper bits make bins of equal relative width.

    Args:
        pieces: Gives the scores piece by piece, float32 and not negative. It is called twice.
    """
    number, total = 0, 0.0
    counts = np.zeros(BINS, dtype=np.int64)
    for piece in pieces():
        number, total = number + piece.numel(), total + float(piece.double().sum())
        counts += torch.bincount(piece.flatten().view(torch.int32) >> SHIFT, minlength=BINS).cpu().numpy()
    mean = total / number
    squares = sum(float((piece.double() - mean).square().sum()) for piece in pieces())
    deviation = (squares / max(1, number - 1)) ** 0.5
    filled = np.flatnonzero(counts)
    # The middle of a bin stands for the scores in it.
    middles = (
        ((filled << SHIFT) + (1 << (SHIFT - 1)) * (filled > 0)).astype(np.int32).view(np.float32).astype(np.float64)
    )
    return Ranked(
        (middles - mean) / deviation if deviation else np.zeros(len(filled)), counts[filled].astype(np.float64)
    )


def sparsities_of(ranked: Sequence[Ranked], sizes: np.ndarray, target: float) -> np.ndarray:
    """Return the sparsity of each unit, (units,), when the lowest members of all units are removed.

    All members are sorted at once, and removed from the lowest score on until only `target` is left.

    Args:
        ranked: The scores of each unit's members.
        sizes: (units,) what all members of each unit cost together.
        target: How much of the sum of sizes may be left.
    """
    unit = np.concatenate([np.full(len(one.scores), index) for index, one in enumerate(ranked)])
    shares = np.concatenate([one.counts / one.counts.sum() for one in ranked])
    order = np.argsort(np.concatenate([one.scores for one in ranked]), kind="stable")
    gone = np.cumsum(sizes[unit[order]] * shares[order])
    last = min(int(np.searchsorted(gone, (sizes.sum() - target) * (1.0 - 1e-12))), len(order) - 1)
    return np.bincount(unit[order[: last + 1]], weights=shares[order[: last + 1]], minlength=len(ranked))


@dataclass(frozen=True)
class Flap(Rule):
    """The rule that sorts all heads and neurons, or all single weights, and removes the lowest.

    Attributes:
        metric: WIFV or WIFN; None takes WIFV for heads and neurons and WIFN for single weights.
    """

    name: ClassVar[str] = "flap"

    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_choice("metric", self.metric, METRICS)

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Refuse units that have no members to sort."""
        for site, unit in zip(sites(model, space), space.units, strict=True):
            _check_kind(site, unit)

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Sort the members of all units at once, and take the allocation nearest to what that leaves."""
        dense = dense_of(problem)
        of_units = sites(dense.model, problem.space)
        moments, tokens = input_moments(dense)
        ranked = [self._ranked(dense, site, moments) for site in of_units]
        limit = problem.budget.leading
        return towards(problem, sparsities_of(ranked, unit_sizes(problem.budget), limit.target)), tokens

    @torch.no_grad()
    def _ranked(self, dense: Dense, site: Site, moments: dict[str, Moments]) -> Ranked:
        (part,) = site.parts
        with on_device(blocks(dense.model)[site.block], dense.device):
            if site.layer is None:
                assert part.groups is not None
                name = f"{part.name}.{part.column}"
                metric = finite(column_metric(part.weight(part.column), moments[name], self.metric or "WIFV"), name)
                return rank_members(metric, part.groups.width, part.kind == ATTENTION)
            name = f"{part.name}.{site.layer}"
            W, of_inputs = finite(part.weight(site.layer), name), moments[name]
            return rank_weights(lambda: weight_scores(W, of_inputs, self.metric or "WIFN"))


def _check_kind(site: Site, unit: Unit) -> None:
    """Raise an InputError if a unit has no members to sort."""
    if unit.kind == WEIGHTS:
        return
    if unit.kind == BITS:
        raise wrong_kind("flap", NEEDS, unit, "use strategy=owl or strategy=alpha_pruning")
    if len(site.parts) > 1 or site.parts[0].groups is None or site.parts[0].groups.members != unit.total:
        raise wrong_kind("flap", NEEDS, unit, "use strategy=shortgpt or strategy=adapt_pruner")
