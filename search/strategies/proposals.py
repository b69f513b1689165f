"""Predictions of what each level of each unit would change, for `search.strategies.guided`.

`Gradient` takes one gradient of the fitness at the parent. `Forward` runs forward passes only, as Bonsai does (Dery et al. 2024):
allocations around the parent in complementary pairs, which move many units at once, and a regression of fitness on what moved,
over all that has been measured so far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from local_prune.bonsai import kendall_tau
from search.strategies.base import Problem, State
from search.strategies.measuring import GRADIENT_COST, Measured
from supernet.space import Allocation

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # of the ridge, by the mean of the kernel's diagonal
FOLDS = 8
REACH = 2  # levels that a unit moves in a perturbation, at most
SHARES = {"unit": 0.4, "kind": 0.3, "depth": 0.3}  # of the prior variance: a unit's own, its kind's, that of units of like depth
WIDTH = 0.1  # of the depth that is alike, as a share of all blocks


class Proposal(Protocol):
    """Predicts from the parent of a state."""

    @property
    def cost(self) -> int:
        """Forward tokens for each token of text."""
        ...

    @property
    def tokens(self) -> int:
        """Of text, that a prediction is made on unless the user says otherwise."""
        ...

    def predict(
        self, measured: Measured, state: State, sequences: Sequence[int], rng: np.random.Generator
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Predicted changes of the fitness, (levels,) of each unit, and what is to be remembered for the next generation."""
        ...

    def learn(
        self, remembered: dict[str, Any], measured: Measured, parent: Allocation, offspring: Sequence[Allocation]
    ) -> dict[str, Any]:
        """What is to be remembered of offspring that have been measured beside their parent."""
        ...


@dataclass(frozen=True)
class Gradient:
    """`<dL/dW, W_level - W_now>` from one gradient at the parent (`search.gradient`)."""

    cost: int = GRADIENT_COST
    tokens: int = 2048

    def predict(
        self, measured: Measured, state: State, sequences: Sequence[int], rng: np.random.Generator
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """See `Proposal`."""
        return measured.changes(state.parent, sequences), {}

    def learn(
        self, remembered: dict[str, Any], measured: Measured, parent: Allocation, offspring: Sequence[Allocation]
    ) -> dict[str, Any]:
        """See `Proposal`; the next gradient says more."""
        return remembered


@dataclass(frozen=True)
class Forward:
    """Ridge regression of the difference within complementary pairs on what differs.

    Each pair is run on a sequence of its own: parent + moves and parent - moves. Curvature, which both share, drops out of
    their difference. Coefficients are the loss of a unit by the share of its dense cost that is removed, with a prior under which
    units of a kind, and units of like depth, are alike; moves are drawn from the same prior. How far to believe in the data is
    chosen by the rank correlation of predictions with pairs that were left out.
    """

    cost: int = 2
    tokens: int = 8192

    def predict(
        self, measured: Measured, state: State, sequences: Sequence[int], rng: np.random.Generator
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """See `Proposal`."""
        problem = measured.problem
        shares, covariance = shares_of(problem), prior_of(problem)
        pairs = list(state.memory.get("pairs", []))
        for sequence in sequences:
            plus, minus = _pair(problem, state.parent, covariance, rng)
            if plus == minus:
                continue
            begun = time.perf_counter()
            losses = measured.losses([plus, minus], [sequence])[:, 0]
            measured.note([plus, minus], losses, 1, set(), time.perf_counter() - begun)
            pairs.append([list(plus), list(minus), float(losses[0] - losses[1])])
        if not pairs:
            return [np.zeros(len(row)) for row in shares], {"pairs": pairs}
        removed = np.array([[[row[level] for row, level in zip(shares, one, strict=True)] for one in pair[:2]] for pair in pairs])
        slopes = regressed(removed[:, 0] - removed[:, 1], np.array([pair[2] for pair in pairs]), covariance)
        changes = [slope * (row - row[level]) for slope, row, level in zip(slopes, shares, state.parent, strict=True)]
        return changes, {"pairs": pairs}

    def learn(
        self, remembered: dict[str, Any], measured: Measured, parent: Allocation, offspring: Sequence[Allocation]
    ) -> dict[str, Any]:
        """See `Proposal`: an offspring and its parent are a pair, too, on all sequences that both were measured on."""
        pairs, before = list(remembered["pairs"]), measured.known(parent)
        for child in offspring:
            after = measured.known(child)
            both = sorted(before.keys() & after.keys())
            if both:
                pairs.append([list(child), list(parent), float(np.mean([after[one] - before[one] for one in both]))])
        return {"pairs": pairs}


PROPOSALS: dict[str, Proposal] = {"gradient": Gradient(), "forward": Forward()}


def shares_of(problem: Problem) -> list[np.ndarray]:
    """(levels,) of each unit: what is removed of its dense cost at each level."""
    return [1.0 - np.array(costs) / max(1, costs[0]) for costs in problem.budget.leading.costs]


def prior_of(problem: Problem) -> np.ndarray:
    """Covariance of the units' coefficients, (units, units): their own, their kind's and that of their depth."""
    units = problem.space.units
    kinds = [(unit.kind, "".join(letter for letter in unit.name if not letter.isdigit())) for unit in units]
    depth = np.array([_block(unit.name) for unit in units], dtype=float)
    depth = (depth - depth.min()) / max(1.0, np.ptp(depth))
    same = np.array([[a == b for b in kinds] for a in kinds], dtype=float)
    near = np.exp(-0.5 * ((depth[:, None] - depth) / WIDTH) ** 2)
    # What a unit has at stake grows with its size: shares of large units weigh more.
    size = np.array([max(1, costs[0]) for costs in problem.budget.leading.costs], dtype=float) ** 0.5
    size = size / size.mean()
    covariance = SHARES["unit"] * np.eye(len(units)) + SHARES["kind"] * same * near + SHARES["depth"] * near
    return np.asarray(covariance * size[:, None] * size)


def _block(name: str) -> int:
    """The number in a unit's name."""
    return next((int(word) for word in name.split(".") if word.isdigit()), 0)


def _pair(
    problem: Problem, parent: Allocation, covariance: np.ndarray, rng: np.random.Generator
) -> tuple[Allocation, Allocation]:
    """The parent with moves drawn from the prior, up for about half of the cost and down for the other, and the opposite ones.

    At its first or last level a unit moves on one side alone: its curvature is taken for slope then.
    """
    drawn = rng.multivariate_normal(np.zeros(len(parent)), covariance, method="cholesky")
    drawn /= np.diag(covariance) ** 0.5
    weights = np.array([max(1, costs[0]) for costs in problem.budget.leading.costs], dtype=float)
    drawn -= np.average(drawn, weights=weights)
    moves = np.sign(drawn).astype(int) * rng.integers(1, REACH + 1, size=len(parent))
    highest = np.array([len(unit.levels) - 1 for unit in problem.space.units])
    sides = (np.clip(np.array(parent) + sign * moves, 0, highest) for sign in (1, -1))
    plus, minus = (tuple(int(level) for level in side) for side in sides)
    return plus, minus


def regressed(moved: np.ndarray, differences: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Coefficients that explain the differences: ridge regression under a prior, in its dual form.

    Args:
        moved: (pairs, units).
        differences: (pairs,).
        covariance: (units, units) of the prior.

    Returns:
        (units,) float64.
    """
    cross = covariance @ moved.T
    gram = moved @ cross
    mean = float(gram.diagonal().mean()) or 1.0
    solve = partial(_dual, gram, differences, mean)
    folds = np.arange(len(differences)) % min(FOLDS, len(differences))
    truth = torch.from_numpy(np.concatenate([differences, -differences]))
    best, strength = -2.0, STRENGTHS[0]
    for one in STRENGTHS if len(differences) >= FOLDS else ():
        predicted = np.zeros_like(differences)
        for fold in range(folds.max() + 1):
            seen = np.flatnonzero(folds != fold)
            unseen = np.flatnonzero(folds == fold)
            predicted[unseen] = gram[np.ix_(unseen, seen)] @ solve(one, seen)
        tau = kendall_tau(torch.from_numpy(np.concatenate([predicted, -predicted])), truth)
        if tau > best:
            best, strength = tau, one
    return np.asarray(cross @ solve(strength, np.arange(len(differences))))


def _dual(gram: np.ndarray, differences: np.ndarray, mean: float, strength: float, seen: np.ndarray) -> np.ndarray:
    """Weights of the pairs that are seen, (seen,)."""
    system = gram[np.ix_(seen, seen)] + strength * mean * np.eye(len(seen))
    return np.asarray(np.linalg.solve(system, differences[seen]))
