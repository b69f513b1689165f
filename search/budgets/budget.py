"""What an allocation may cost: one limit, or several that are all kept.

A limit counts one thing (parameters, bits, FLOPs, bytes, nanoseconds) in whole numbers that add up over units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from supernet.errors import InputError
from supernet.space import Allocation, Space

Costs = tuple[tuple[int, ...], ...]  # of each level of each unit


@dataclass(frozen=True)
class Limit:
    """At most `target` of what the dense model's units take, `dense`.

    Attributes:
        kind: What is counted: parameters, bits, flops, bytes, latency (nanoseconds).
        target: The most that all units together may take.
        dense: What they take at the dense level.
        costs: What each level of each unit takes; never rising from level to level.
        dense_bits: Of a weight, where bits are counted.
        slack: What may be left of the target in any case, where costs are not known better.
        rest: What the whole dense model takes besides its units; None where the limit is of the units alone.
    """

    kind: str
    target: int
    dense: int
    costs: Costs
    dense_bits: int = 0
    slack: int = 0
    rest: int | None = None

    def __str__(self) -> str:
        if self.kind == "latency":
            units = f"{self.target / 1e6:,.3f} of {self.dense / 1e6:,.3f} ms of all units"
            if self.rest is None:
                return f"{units} to keep, {self.target / self.dense:.1%}"
            whole = (
                f"{(self.target + self.rest) / 1e6:,.3f} of {(self.dense + self.rest) / 1e6:,.3f} ms of the whole model"
            )
            return f"{whole} to keep ({units}, {self.target / self.dense:.1%})"
        if self.rest is not None:
            whole = f"{self.target + self.rest:,} of {self.dense + self.rest:,} {self.kind} of the whole model to keep"
            return f"{whole} ({self.target:,} of {self.dense:,} of what can be pruned, {self.target / self.dense:.1%})"
        share = f"{self.target:,} of {self.dense:,} prunable {self.kind} to keep, {self.target / self.dense:.1%}"
        return f"{share} ({self.dense_bits * self.target / self.dense:.2f} bits a weight)" if self.dense_bits else share

    @cached_property
    def table(self) -> np.ndarray:
        """The costs as (units, most levels) int64; a unit with fewer levels repeats the cost of its last one."""
        most = max(len(row) for row in self.costs)
        return np.array([[*row, *[row[-1]] * (most - len(row))] for row in self.costs], dtype=np.int64)

    @cached_property
    def smallest_step(self) -> int:
        """The smallest difference in cost between neighbouring levels of any unit, or the slack where that is more."""
        steps = -np.diff(self.table, axis=1)
        return max(self.slack, int(steps[steps > 0].min(initial=self.dense or 1)))

    @cached_property
    def lowest(self) -> int:
        """The cost of the sparsest allocation."""
        return sum(row[-1] for row in self.costs)

    def cost(self, allocation: Sequence[int]) -> int:
        """Return the cost of an allocation."""
        return sum(row[level] for row, level in zip(self.costs, allocation, strict=True))


@dataclass(frozen=True)
class Budget:
    """The limits of a run, all of which an allocation must keep. `allocation.json` reports the first one."""

    limits: tuple[Limit, ...]

    @classmethod
    def from_sparsity(cls, sparsity: float, space: Space, kind: str = "parameters") -> Budget:
        """Return a budget that removes the fraction `sparsity` of the prunable parameters, or bits.

        The target is rounded down to a whole number of them. InputError where even the sparsest allocation keeps more.
        """
        check_sparsity(sparsity)
        # as typed: 0.55 of 20 leaves 9, not 8.99...
        target = math.floor(space.dense_cost * (1 - Fraction(str(float(sparsity)))))
        if target < space.lowest_cost:
            raise InputError(_unreachable(sparsity, space, kind))
        return cls(
            (Limit(kind, target, space.dense_cost, costs_of(space), space.units[0].total if kind == "bits" else 0),)
        )

    def __str__(self) -> str:
        return "; ".join(str(limit) for limit in self.limits)

    @property
    def first(self) -> Limit:
        """The limit that reports and tables show."""
        return self.limits[0]

    @property
    def leading(self) -> Limit:
        """The limit whose target is the smallest share of the dense model."""
        return min(self.limits, key=lambda limit: limit.target / limit.dense)

    def left(self, allocation: Sequence[int]) -> float:
        """Return what an allocation leaves of the tightest limit, counted in that limit's smallest steps. It is
        negative where a limit is exceeded.
        """
        return min((limit.target - limit.cost(allocation)) / limit.smallest_step for limit in self.limits)

    def fits(self, allocation: Sequence[int]) -> bool:
        """Whether an allocation exceeds no limit."""
        return self.left(allocation) >= 0

    def met(self, allocation: Sequence[int]) -> bool:
        """Whether an allocation exceeds no limit, and leaves less than one smallest step of at least one of them."""
        return 0 <= self.left(allocation) < 1

    def allows(self, allocation: Sequence[int], beside: Allocation) -> bool:
        """Whether an allocation meets the budget, or, where none can, comes at least as near to it as `beside`, which
        fits.
        """
        return 0 <= (left := self.left(allocation)) and (left < 1 or left <= self.left(beside))


def costs_of(space: Space) -> Costs:
    """Return what each level of each unit costs as the space itself counts: in parameters, or in bits."""
    return tuple(tuple(level.cost for level in unit.levels) for unit in space.units)


def _unreachable(sparsity: float, space: Space, kind: str) -> str:
    """Say why no allocation of the space is as sparse as that, and what would help."""
    least = space.lowest_cost / space.dense_cost
    if kind == "bits":
        dense = space.units[0].total
        return (
            f"budget.bits={(1.0 - sparsity) * dense:g} (budget.sparsity={sparsity:g}) cannot be met: all layers at "
            f"their narrowest take {least * dense:.4g} bits a weight, scales and zeros included; raise it, or add "
            "widths to prune.pruner.bits"
        )
    return (
        f"budget.sparsity={sparsity:g} cannot be met: all units at their highest level remove {1.0 - least:.4g}; lower "
        "it, or raise supernet.levels or supernet.step (with prune.pruner.pattern, add a sparser one)"
    )


def check_sparsity(sparsity: float) -> None:
    """InputError for a sparsity that no space could have. 0 is allowed: removing nothing checks the pipeline."""
    if not 0.0 <= sparsity < 1.0:
        raise InputError(
            f"budget.sparsity={sparsity:g} must be at least 0 and below 1; 0.5 removes half of the prunable "
            "parameters, 0 nothing"
        )
