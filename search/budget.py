"""The cost that an allocation must not exceed, and exact ways to meet it.

`Budget` counts parameters of the prunable part. `closest` is an exact knapsack over levels: the allocation nearest to a wish
whose cost lies within one smallest step of the budget, never above it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from supernet.errors import InputError
from supernet.space import Allocation, Space

CELLS = 200_000  # of the knapsack's table; costs whose common divisor is too small for that are rounded up


@dataclass(frozen=True)
class Budget:
    """At most `target` of `dense` parameters, or bits, as `kind` says."""

    target: int
    dense: int
    kind: str = "parameters"
    dense_bits: int = 0  # of a weight, where bits are counted

    @classmethod
    def from_sparsity(cls, sparsity: float, space: Space, kind: str = "parameters") -> Budget:
        """Remove the fraction `sparsity` of the prunable parameters or bits; InputError where this space cannot."""
        check_sparsity(sparsity)
        target = int(space.dense_cost * (1.0 - sparsity))
        if target < space.lowest_cost:
            raise InputError(_unreachable(sparsity, space, kind))
        return cls(target, space.dense_cost, kind, space.units[0].total if kind == "bits" else 0)

    def __str__(self) -> str:
        share = f"{self.target:,} of {self.dense:,} prunable {self.kind} to keep, {self.target / self.dense:.1%}"
        return f"{share} ({self.dense_bits * self.target / self.dense:.2f} bits a weight)" if self.dense_bits else share

    def met(self, space: Space, allocation: Allocation) -> bool:
        """Not above the budget, and less than one smallest step below it."""
        return 0 <= self.target - space.cost(allocation) < max(1, space.smallest_step)


def _unreachable(sparsity: float, space: Space, kind: str) -> str:
    """Why the space has nothing as sparse, and what to do."""
    least = space.lowest_cost / space.dense_cost
    if kind == "bits":
        dense = space.units[0].total
        return (
            f"budget.bits={(1.0 - sparsity) * dense:g} (budget.sparsity={sparsity:g}) cannot be met: all layers at their "
            f"narrowest take {least * dense:.4g} bits a weight, scales and zeros included; raise it, or add widths to "
            "prune.pruner.bits"
        )
    return (
        f"budget.sparsity={sparsity:g} cannot be met: all units at their highest level remove {1.0 - least:.4g}; "
        "lower it, or raise supernet.levels or supernet.step (with prune.pruner.pattern, add a sparser one)"
    )


def check_sparsity(sparsity: float) -> None:
    """InputError for a sparsity that no space could have."""
    if not 0.0 < sparsity < 1.0:
        raise InputError(f"budget.sparsity={sparsity:g} must lie between 0 and 1; 0.5 removes half of the prunable parameters")


def uniform(space: Space, budget: Budget) -> Allocation:
    """The allocation that gives every unit the same sparsity, as evenly as its levels allow.

    Where the wanted sparsity falls between two levels, units of a kind and size take turns over depth so that their running total
    follows the wanted one; the knapsack then moves as little as it can to meet the budget. Sparsity is that of costs, which for
    bit widths count scales and zeros.
    """
    sparsity = 1.0 - budget.target / budget.dense
    wish = [0] * len(space.units)
    owed: dict[tuple[str, int], float] = defaultdict(float)
    for index, unit in enumerate(space.units):
        alike = unit.kind, unit.levels[0].cost
        removed = np.array([1.0 - level.cost / unit.levels[0].cost for level in unit.levels])
        owed[alike] += sparsity
        away = np.abs(removed - owed[alike]).round(9)
        wish[index] = int(np.flatnonzero(away == away.min())[-1])  # the sparser of two as near
        owed[alike] -= removed[wish[index]]
    # What must give way for the budget: distance to the wish alone would as soon take a unit's second step as another's first.
    shares = [(1.0 - sparsity) * unit.levels[0].cost for unit in space.units]
    losses = [
        a + 1e-3 * b
        for a, b in zip(_distances(space, budget, _costs(space, wish)), _distances(space, budget, shares), strict=True)
    ]
    return knapsack(space, losses, budget)


def closest(space: Space, wish: Allocation, budget: Budget) -> Allocation:
    """The allocation nearest to `wish` that meets the budget (or, where none comes within a step of it, the fullest below it).

    Distance is the sum over units of the squared difference in cost.
    """
    return knapsack(space, _distances(space, budget, _costs(space, wish)), budget)


def _costs(space: Space, allocation: Sequence[int]) -> list[float]:
    return [float(unit.levels[level].cost) for unit, level in zip(space.units, allocation, strict=True)]


def _distances(space: Space, budget: Budget, costs: Sequence[float]) -> list[np.ndarray]:
    """For each unit the squared distance of each of its levels from a cost, as a share of the dense model's."""
    return [
        np.array([((level.cost - cost) / budget.dense) ** 2 for level in unit.levels])
        for unit, cost in zip(space.units, costs, strict=True)
    ]


def knapsack(space: Space, losses: Sequence[np.ndarray], budget: Budget) -> Allocation:
    """The allocation of least total loss among those that meet the budget: dynamic programming over exact costs.

    Args:
        losses: For each unit the loss of each of its levels.
    """
    cell = max(gcd(*(level.cost for unit in space.units for level in unit.levels)), -(-budget.target // CELLS))
    cells = budget.target // cell
    best = np.full(cells + 1, np.inf)
    best[0] = 0.0
    choices = []
    for unit, loss in zip(space.units, losses, strict=True):
        new, choice = np.full(cells + 1, np.inf), np.zeros(cells + 1, dtype=np.int16)
        for level, value in enumerate(loss):
            cost = -(-unit.levels[level].cost // cell)
            if cost > cells:
                continue
            total = best[: cells + 1 - cost] + value
            better = total < new[cost:]
            new[cost:][better] = total[better]
            choice[cost:][better] = level
        best = new
        choices.append(choice)
    window = max(0, (budget.target - max(1, space.smallest_step)) // cell + 1)
    at = _fullest(best, window)
    allocation = tuple(len(unit.levels) - 1 for unit in space.units) if at is None else _trace(space, choices, at, cell)
    if space.cost(allocation) > budget.target:
        raise InputError("no allocation meets the budget; lower budget.sparsity or raise supernet.levels")
    return _spend_rest(space, losses, allocation, budget)


def _fullest(best: np.ndarray, window: int) -> int | None:
    """The cell of least loss within the window, or the fullest reachable cell below it; None where rounding leaves no cell."""
    if np.isfinite(best[window:]).any():
        return window + int(best[window:].argmin())
    reachable = np.flatnonzero(np.isfinite(best))
    return int(reachable[-1]) if len(reachable) else None


def _spend_rest(space: Space, losses: Sequence[np.ndarray], allocation: Allocation, budget: Budget) -> Allocation:
    """Spend what rounding costs up to whole cells left over, by the denser levels that cost least loss."""
    levels = list(allocation)
    while (rest := budget.target - space.cost(levels)) >= max(1, space.smallest_step):
        able = [
            (float(losses[i][level] - losses[i][now]), i, level)
            for i, now in enumerate(levels)
            for level in range(now)
            if space.units[i].levels[level].cost - space.units[i].levels[now].cost <= rest
        ]
        if not able:
            break
        _, unit, level = min(able)
        levels[unit] = level
    return tuple(levels)


def _trace(space: Space, choices: Sequence[np.ndarray], at: int, cell: int) -> Allocation:
    levels = []
    for unit, choice in zip(reversed(space.units), reversed(choices), strict=True):
        level = int(choice[at])
        levels.append(level)
        at -= -(-unit.levels[level].cost // cell)
    return tuple(reversed(levels))
