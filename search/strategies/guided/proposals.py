"""Predicts, for the guided search, by how much each level of each unit would change the fitness.

`GradientProposal` takes one gradient of the fitness at the parent. `ForwardProposal` runs forward passes only, as
Bonsai does (Dery et al. 2024): it measures pairs of allocations, which differ in many units at once, and regresses the
differences in fitness on what differs, over all pairs measured so far. It takes the shape of a unit's loss over its
levels from the errors that the candidates had when they were built, and learns how much each unit's error weighs. SPDY
(Frantar and Alistarh 2022) searches such weights at random.
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

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # strengths of the ridge to try, in means of the kernel's diagonal
CAUTION = (1.0, 3.0, 10.0)  # multiples of the best strength: the larger, the less a prediction believes the data
MISFIT = 0.25  # variance of what the linear model misses of a pair, relative to the noise of one sequence
FOLDS = 8  # of the cross-validation that chooses the strength
SHARES = {"unit": 0.35, "kind": 0.35, "depth": 0.15, "both": 0.15}  # of the prior variance, by what units share
WIDTH = 0.05  # how far apart in depth units are still alike, as a share of all blocks
SPREAD = 0.7  # how far the weights of a pair are drawn apart, in standard deviations of the prior
NOISE = 0.3  # the same for the predictions that are drawn around what was learned
DRAWN = 5  # how many predictions are drawn

Prediction = Sequence[np.ndarray]  # for each unit (levels,): by how much each level would change the fitness
Pairs = tuple[Pair, ...]


class Proposal(Protocol):
    """A way to predict what each level of each unit would change, seen from a parent."""

    @property
    def cost(self) -> int:
        """How many forward passes a prediction costs, for each token that it is made on."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens a prediction is made on unless the user says otherwise."""
        ...

    @property
    def damping(self) -> float:
        """The damping of the first generation: the larger, the less a prediction is believed far from the parent."""
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
        """Predict what levels would change, seen from a parent. Called once, at the beginning of a generation.

        Args:
            problem: The problem that is searched.
            measured: Measures allocations and counts the tokens of this generation.
            parent: The allocation to predict from.
            pairs: What `learn` returned in the generation before; empty in the first one.
            sequences: Which sequences of the search text to predict on.
            rng: The random generator to draw from.

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
    """Predicts to first order, `<dL/dW, W_level - W_now>`, from one gradient at the parent."""

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
        """Predict by a gradient or, if that is not finite, by the errors that candidates had when they were built."""
        changes = measured.effects(parent, sequences)
        if not all(np.isfinite(one).all() for one in changes):
            log.warning(
                "the gradient is not finite; this generation goes by the errors that candidates had when they were "
                "built"
            )
            changes = [curve - curve[level] for curve, level in zip(curves_of(problem), parent, strict=True)]
        return [changes], pairs

    def learn(self, pairs: Pairs, measured: Measured, parent: Allocation, offspring: Sequence[Allocation]) -> Pairs:
        """Return the pairs unchanged, because the next gradient says more than they would."""
        return pairs


@dataclass(frozen=True)
class ForwardProposal:
    """Predicts by ridge regression of the differences within pairs of allocations on what differs between them.

    The loss is modelled as a weighted sum, over units, of the errors of their candidates (`curves_of`). The weights are
    learned; under the prior for their logarithms, units of the same kind and units of similar depth are alike. For a
    pair, weights are drawn from the prior around what is known so far; the knapsack's allocations under them, and under
    the opposite ones, are measured on one sequence. What both share drops out of their difference. How far to believe
    the data is chosen by the rank correlation of predictions with pairs that were left out.
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
        """Measure one pair on each sequence, and regress on all pairs so far.

        The first predictions believe the data less and less; the other ones are drawn around the first of them.
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
        """Add each offspring and its parent as a pair, over all sequences that both were measured on."""
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
    """Return what each level of each unit loses, (levels,) for each unit, scaled so that the start loses 1 in total.

    The loss of a level is the error that was recorded when its candidate was built, times the unit's size. A unit
    without recorded errors loses the square of the share that is removed from it.

    A candidate that is fitted to make up for errors in earlier layers misses a part of its target at every level, even
    at the lowest. That part is taken off: the first step is made to lose at most as much per cost as the second one.
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
    """Return the prior covariance of the logarithms of the units' weights, (units, units).

    It is the sum of a part of the unit's own, one shared with units of its kind, one with units of similar depth, and
    one with units of both its kind and similar depth.
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
    """Return the first number in a unit's name, which is the index of its block; 0 if there is none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), 0)


def _weighted(curves: Prediction, logarithms: np.ndarray) -> list[np.ndarray]:
    return [curve * weight for curve, weight in zip(curves, np.exp(logarithms), strict=True)]


def learned(pairs: Sequence[Pair], curves: Prediction, root: np.ndarray) -> list[np.ndarray]:
    """Return the logarithms of the units' weights that pairs teach, (units,) float64 for each of `CAUTION`.

    The loss is linear in the weights. What is regressed is how far they are from 1; it is then taken for their
    logarithm, so that weights stay positive.

    Args:
        pairs: The pairs measured so far.
        curves: What each level of each unit loses at a weight of 1 (`curves_of`).
        root: (units, units) a root of the prior's covariance, which is `root @ root.T`.
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
    # The mean square that differences would have under the prior if the scale were 1.
    squares = (moved.sum(1) ** 2 + ((moved @ root) ** 2).sum(1)).mean()
    scale = float((differences**2).mean() / squares) ** 0.5 if squares > 0 else 0.0
    if scale == 0.0:
        return [np.zeros(len(curves)) for _ in CAUTION]
    besides: dict[tuple[int, ...], int] = {}  # offspring of one parent share its noise, so they are left out together
    groups = np.array([besides.setdefault(pair.second, len(besides)) for pair in pairs])
    sequences = np.array([pair.sequences for pair in pairs])
    noise = (1.0 / sequences + MISFIT) / (1.0 + MISFIT)
    return regressed(moved * scale, differences, noise, groups, root)


def regressed(
    moved: np.ndarray, differences: np.ndarray, noise: np.ndarray, groups: np.ndarray, root: np.ndarray
) -> list[np.ndarray]:
    """Solve `differences = moved @ (1 + z)` for z, by ridge regression under a prior and in its dual form.

    Args:
        moved: (pairs, units) by how much each unit's loss differs within a pair, at a weight of 1.
        differences: (pairs,) by how much the measured losses differ.
        noise: (pairs,) variance of a difference, relative to that of a pair on one sequence.
        groups: (pairs,) int number of a pair's group; pairs of one group are left out together.
        root: (units, units) a root of the prior's covariance, which is `root @ root.T`.

    Returns:
        z, (units,) float64, for each of `CAUTION`: at the strength that ranks left-out pairs best, and stronger ones.
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
    """Solve the dual system of the ridge regression for the coefficients of the pairs that are seen, (seen,)."""
    system = gram[np.ix_(seen, seen)] + strength * np.diag(noise[seen])
    return np.asarray(np.linalg.solve(system, rest[seen]))
