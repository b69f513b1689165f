"""Predictions of what each level of each unit would change, for `search.strategies.guided.search`.

`GradientProposal` takes one gradient of the fitness at the parent. `ForwardProposal` runs forward passes only, as
Bonsai does (Dery et al. 2024): it measures complementary pairs of allocations, which differ in many units at once, and
regresses the differences in fitness, over all that has been measured so far, on what differs. What a unit's levels lose
is taken from the errors that its candidates had when they were built; how much a unit's error weighs is what is learned
(SPDY, Frantar and Alistarh 2022, searches such weights at random).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from local_prune.regression import kendall_tau
from search.budgets.budget import costs_of
from search.budgets.knapsack import relaxed
from search.strategies.base import Problem
from search.strategies.measuring import GRADIENT_COST, Measured, Pair
from supernet.space import Allocation

log = logging.getLogger(__name__)

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # of the ridge, by the mean of the kernel's diagonal
CAUTION = (1.0, 3.0, 10.0)  # times the strength that ranks best: offspring of predictions that believe the data less
MISFIT = 0.25  # variance of what the model misses of a pair, in that of a sequence
FOLDS = 8
SHARES = {"unit": 0.35, "kind": 0.35, "depth": 0.15, "both": 0.15}  # of the prior variance: who is alike
WIDTH = 0.05  # of the depth that is alike, as a share of all blocks
SPREAD = 0.7  # of a pair's weights, in standard deviations of the prior
NOISE = 0.3  # of those offspring whose weights are drawn around what was learned
DRAWN = 5  # of them

Prediction = Sequence[np.ndarray]  # (levels,) of each unit: by how much the fitness would change at each of its levels
Pairs = tuple[Pair, ...]


class Proposal(Protocol):
    """A way to predict what each level of each unit would change, seen from a parent."""

    @property
    def cost(self) -> int:
        """How many passes a token of text costs."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens a prediction is made on unless the user says otherwise."""
        ...

    @property
    def damping(self) -> float:
        """How little a prediction is believed far from the parent, in the first generation."""
        ...

    def predict(
        self,
        problem: Problem,
        measured: Measured,
        parent: Allocation,
        pairs: Pairs,
        sequences: Sequence[int],
        rng: np.random.Generator,
    ) -> tuple[list[Prediction], Pairs]:
        """Predict at a parent; called once at the beginning of a generation.

        Args:
            problem: What is searched.
            measured: Measures and counts for this generation.
            parent: The allocation to predict from.
            pairs: What `learn` returned in the generation before; none in the first one.
            sequences: Of the search text, to predict on.
            rng: Where chance comes from.

        Returns:
            One prediction or several, which take turns in making offspring, and the pairs for `learn`.
        """
        ...

    def learn(self, pairs: Pairs, measured: Measured, parent: Allocation, offspring: Sequence[Allocation]) -> Pairs:
        """Return the pairs to remember, now that offspring have been measured beside their parent.

        Called at the end of the generation, with the pairs that `predict` returned.
        """
        ...


@dataclass(frozen=True)
class GradientProposal:
    """`<dL/dW, W_level - W_now>` from one gradient at the parent (`search.evaluation.gradient`)."""

    cost: int = GRADIENT_COST
    tokens: int = 2048
    damping: float = 8.0

    def predict(
        self,
        problem: Problem,
        measured: Measured,
        parent: Allocation,
        pairs: Pairs,
        sequences: Sequence[int],
        rng: np.random.Generator,
    ) -> tuple[list[Prediction], Pairs]:
        """Predict by a gradient; where it overflows, by the errors that the candidates had when they were built."""
        changes = measured.effects(parent, sequences)
        if not all(np.isfinite(one).all() for one in changes):
            log.warning(
                "the gradient is not finite; this generation goes by the errors that candidates had when they were "
                "built"
            )
            changes = [curve - curve[level] for curve, level in zip(curves_of(problem), parent, strict=True)]
        return [changes], pairs

    def learn(self, pairs: Pairs, measured: Measured, parent: Allocation, offspring: Sequence[Allocation]) -> Pairs:
        """Learn nothing: the next gradient says more."""
        return pairs


@dataclass(frozen=True)
class ForwardProposal:
    """Ridge regression of the difference within complementary pairs on what differs.

    The loss is taken for a weighted sum over units of the errors of their candidates (`curves_of`). The logarithms of
    the weights have a prior under which units of a kind, and units of like depth, are alike. A pair is what the
    knapsack takes under weights drawn from it around what is known so far, and under the opposite ones; it is run on a
    sequence of its own. What both sides share drops out of their difference. How far to believe in the data is chosen
    by the rank correlation of predictions with pairs that were left out.
    """

    cost: int = 2
    tokens: int = 8192
    damping: float = 0.25

    def predict(
        self,
        problem: Problem,
        measured: Measured,
        parent: Allocation,
        pairs: Pairs,
        sequences: Sequence[int],
        rng: np.random.Generator,
    ) -> tuple[list[Prediction], Pairs]:
        """Measure a pair on each sequence and regress on all pairs so far.

        The predictions that are returned believe the data less and less; others are drawn around the first of them.
        """
        curves, root = curves_of(problem), np.linalg.cholesky(prior_of(problem))
        known = learned(pairs, curves, root)[0]
        found = list(pairs)
        for sequence in sequences:
            drawn = SPREAD * root @ rng.standard_normal(len(curves))
            sides = [relaxed(_weighted(curves, known + sign * drawn), problem.budget) for sign in (1, -1)]
            if sides[0] == sides[1]:
                continue
            begun = time.perf_counter()
            losses = measured.losses(sides, [sequence])[:, 0]
            measured.note(sides, losses, 1, set(), time.perf_counter() - begun)
            if np.isfinite(losses).all():
                found.append(Pair(sides[0], sides[1], float(losses[0] - losses[1]), 1))
        logarithms = learned(found, curves, root)
        logarithms += [logarithms[0] + NOISE * root @ rng.standard_normal(len(curves)) for _ in range(DRAWN)]
        weighted = [_weighted(curves, one) for one in logarithms]
        changes = [[row - row[level] for row, level in zip(rows, parent, strict=True)] for rows in weighted]
        return list(changes), tuple(found)

    def learn(self, pairs: Pairs, measured: Measured, parent: Allocation, offspring: Sequence[Allocation]) -> Pairs:
        """Add each offspring and its parent as a pair, on all sequences that both were measured on."""
        found, before = list(pairs), measured.known(parent)
        for child in offspring:
            after = measured.known(child)
            both = [one for one in sorted(before.keys() & after.keys()) if np.isfinite([before[one], after[one]]).all()]
            if both:
                difference = float(np.mean([after[one] - before[one] for one in both]))
                found.append(Pair(child, parent, difference, len(both)))
        return tuple(found)


PROPOSALS: dict[str, Proposal] = {"gradient": GradientProposal(), "forward": ForwardProposal()}


def curves_of(problem: Problem) -> list[np.ndarray]:
    """(levels,) of each unit: what its candidates lose, their recorded errors by the unit's size; together 1 at the
    start.

    A candidate that makes up for errors in front of its unit misses a part of its target at every level: what the first
    step loses is at most what the second one shows. Units without recorded errors lose the square of the share that is
    removed.
    """
    curves = []
    errors = problem.errors or [None] * len(problem.space.units)
    for row, costs in zip(errors, costs_of(problem.space), strict=True):
        cost = np.array(costs, dtype=float)
        if row is None or not np.isfinite(row).all():
            loss = (1.0 - cost / max(1.0, cost[0])) ** 2
        else:
            loss = np.maximum.accumulate(np.array(row, dtype=float))
            if len(loss) > 2 and cost[1] > cost[2]:
                first = min(loss[1], (loss[2] - loss[1]) * (cost[0] - cost[1]) / (cost[1] - cost[2]))
                loss[1:] -= loss[1] - first
        curves.append(loss * max(1.0, cost[0]))
    total = sum(curve[level] for curve, level in zip(curves, problem.start, strict=True))
    return [curve / total for curve in curves] if total > 0 else curves


def prior_of(problem: Problem) -> np.ndarray:
    """Covariance of the logarithms of the units' weights, (units, units): a unit's own, its kind's, its depth's, that
    of both.
    """
    units = problem.space.units
    kinds = [(unit.kind, "".join(letter for letter in unit.name if not letter.isdigit())) for unit in units]
    depth = np.array([_block(unit.name) for unit in units], dtype=float)
    depth = (depth - depth.min()) / max(1.0, np.ptp(depth))
    same = np.array([[a == b for b in kinds] for a in kinds], dtype=float)
    near = np.exp(-0.5 * ((depth[:, None] - depth) / WIDTH) ** 2)
    shared = SHARES["kind"] * same + SHARES["depth"] * near + SHARES["both"] * same * near
    return np.asarray(SHARES["unit"] * np.eye(len(units)) + shared)


def _block(name: str) -> int:
    """The number in a unit's name."""
    return next((int(word) for word in name.split(".") if word.isdigit()), 0)


def _weighted(curves: Prediction, logarithms: np.ndarray) -> list[np.ndarray]:
    return [curve * weight for curve, weight in zip(curves, np.exp(logarithms), strict=True)]


def learned(pairs: Sequence[Pair], curves: Prediction, root: np.ndarray) -> list[np.ndarray]:
    """Return the logarithms of the units' weights as pairs teach them, (units,) for each of `CAUTION`.

    The loss is linear in the weights; their logarithms are taken for how far they are from 1, which keeps them
    positive.
    """
    if not pairs:
        return [np.zeros(len(curves)) for _ in CAUTION]
    lost = np.array(
        [
            [[curve[level] for curve, level in zip(curves, side, strict=True)] for side in (pair.first, pair.second)]
            for pair in pairs
        ]
    )
    moved, differences = lost[:, 0] - lost[:, 1], np.array([pair.difference for pair in pairs])
    # of the differences, by the prior, at a scale of 1
    squares = (moved.sum(1) ** 2 + ((moved @ root) ** 2).sum(1)).mean()
    scale = float((differences**2).mean() / squares) ** 0.5 if squares > 0 else 0.0
    if scale == 0.0:
        return [np.zeros(len(curves)) for _ in CAUTION]
    besides: dict[tuple[int, ...], int] = {}  # offspring of one parent share its noise: they are left out together
    groups = np.array([besides.setdefault(pair.second, len(besides)) for pair in pairs])
    sequences = np.array([pair.sequences for pair in pairs])
    noise = (1.0 / sequences + MISFIT) / (1.0 + MISFIT)
    return regressed(moved * scale, differences, noise, groups, root)


def regressed(
    moved: np.ndarray, differences: np.ndarray, noise: np.ndarray, groups: np.ndarray, root: np.ndarray
) -> list[np.ndarray]:
    """The z of `differences = moved @ (1 + z)`: ridge regression under a prior, in its dual form.

    Args:
        moved: (pairs, units).
        differences: (pairs,).
        noise: (pairs,) variance of a difference, relative to that of a pair on one sequence.
        groups: (pairs,) int: pairs of a group are left out together.
        root: (units, units): the prior's covariance is `root @ root.T`.

    Returns:
        (units,) float64 for each of `CAUTION`: at the strength that ranks left-out pairs best, and at stronger ones.
    """
    half = moved @ root
    gram, cross = half @ half.T, root @ half.T
    mean = float(gram.diagonal().mean()) or 1.0
    solve = partial(_dual, gram, differences - moved.sum(1), mean * noise)
    folds = groups % FOLDS
    truth = torch.from_numpy(np.concatenate([differences, -differences]))
    best, strength = -2.0, 1.0
    for one in STRENGTHS if groups.max() + 1 >= FOLDS else ():
        predicted = moved.sum(1)
        for fold in range(FOLDS):
            seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            predicted[unseen] += gram[np.ix_(unseen, seen)] @ solve(one, seen)
        tau = kendall_tau(torch.from_numpy(np.concatenate([predicted, -predicted])), truth)
        if tau > best:
            best, strength = tau, one
    return [cross @ solve(strength * more, np.arange(len(differences))) for more in CAUTION]


def _dual(gram: np.ndarray, rest: np.ndarray, noise: np.ndarray, strength: float, seen: np.ndarray) -> np.ndarray:
    """Weights of the pairs that are seen, (seen,)."""
    system = gram[np.ix_(seen, seen)] + strength * np.diag(noise[seen])
    return np.asarray(np.linalg.solve(system, rest[seen]))
