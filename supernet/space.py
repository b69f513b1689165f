"""Units with their levels and costs: the space that a search moves in.

Everything is counted in whole members (KV groups, neurons) and whole parameters, so that budgets are met exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

# Kinds of units: a sub-block with its members (KV groups, neurons) or as a whole,
ATTENTION, MLP, MIXER = "attention", "mlp", "mixer"
# the query heads of an attention, the weights of a linear layer, their bit width, and a block that is there or is not.
HEADS, WEIGHTS, BITS, BLOCK = "heads", "weights", "bits", "block"

Allocation = tuple[int, ...]  # one level index per unit, in the order of the space


@dataclass(frozen=True)
class Level:
    """One choice for a unit: `kept` of its members stay, at a cost of `cost` parameters (or bits)."""

    kept: int
    cost: int


@dataclass(frozen=True)
class Unit:
    """The smallest thing that gets its own level.

    Attributes:
        name: The name of the sub-block, linear layer or block.
        kind: One of the kinds that this module names.
        total: How many members it has.
        levels: Its levels, the dense one first; costs fall strictly from level to level.
    """

    name: str
    kind: str
    total: int
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"{self.name}: a unit has at least one member, not {self.total}")
        costs = [level.cost for level in self.levels]
        if (
            not costs
            or self.levels[0].kept != self.total
            or any(a <= b for a, b in zip(costs, costs[1:], strict=False))
        ):
            raise ValueError(f"{self.name}: levels must start dense and fall strictly in cost, not {self.levels}")

    def sparsity(self, level: int) -> float:
        """Return the fraction of the unit's members that is removed at a level."""
        return 1.0 - self.levels[level].kept / self.total

    def nearest(self, kept: int) -> int:
        """Return the level that keeps nearest to `kept` members; of two that are as near, the denser one."""
        return min(range(len(self.levels)), key=lambda index: abs(self.levels[index].kept - kept))


@dataclass(frozen=True)
class Space:
    """All units with their levels, in the order of the forward pass.

    Costs are parameters of the prunable part of the model, or bits where units are bit widths.
    """

    units: tuple[Unit, ...]

    @cached_property
    def dense_cost(self) -> int:
        """The cost of the dense allocation."""
        return sum(unit.levels[0].cost for unit in self.units)

    @cached_property
    def lowest_cost(self) -> int:
        """The cost of the sparsest allocation."""
        return sum(unit.levels[-1].cost for unit in self.units)

    @cached_property
    def smallest_step(self) -> int:
        """The smallest difference in cost between neighbouring levels of any unit; 0 where no unit has a choice."""
        steps = (a.cost - b.cost for unit in self.units for a, b in zip(unit.levels, unit.levels[1:], strict=False))
        return min(steps, default=0)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all units and levels."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.to_json()).encode())

    def cost(self, allocation: Sequence[int]) -> int:
        """Return the cost of an allocation: the sum of the costs of the chosen levels."""
        return sum(unit.levels[level].cost for unit, level in zip(self.units, allocation, strict=True))

    def kept(self, allocation: Sequence[int]) -> dict[str, int]:
        """Return how many members each unit keeps, by name: an allocation that can be read without the levels."""
        return {unit.name: unit.levels[level].kept for unit, level in zip(self.units, allocation, strict=True)}

    def nearest(self, kept: dict[str, int]) -> Allocation:
        """Return the allocation of this space that is nearest, unit by unit, to these numbers of members."""
        return tuple(unit.nearest(kept[unit.name]) for unit in self.units)

    def to_json(self) -> list[dict[str, object]]:
        """Return a JSON-able list of the units, which `from_json` reads back."""
        return [
            {"name": u.name, "kind": u.kind, "total": u.total, "levels": [[v.kept, v.cost] for v in u.levels]}
            for u in self.units
        ]

    @staticmethod
    def from_json(units: Iterable[Mapping[str, Any]]) -> Space:
        """Read what `to_json` gave; raise ValueError, KeyError or TypeError for what it cannot have given."""
        space = Space(tuple(map(_unit_from_json, units)))
        if len({unit.name for unit in space.units}) < len(space.units):
            raise ValueError("two units have the same name")
        return space


def _unit_from_json(content: Mapping[str, Any]) -> Unit:
    name, kind, total = content["name"], content["kind"], content["total"]
    levels = tuple(Level(*pair) for pair in content["levels"])
    if type(name) is not str or type(kind) is not str:
        raise TypeError("the name and the kind of a unit are texts")
    if any(type(number) is not int or number < 0 for level in levels for number in (total, level.kept, level.cost)):
        raise TypeError(f"{name[:200]!r}: members and costs are whole numbers that are not negative")
    if any(level.kept > total for level in levels):
        raise ValueError(f"{name[:200]!r}: a level keeps more than all")
    return Unit(name, kind, total, levels)


def kept_counts(total: int, sparsities: Iterable[float], multiple: int) -> tuple[int, ...]:
    """Return how many members to keep at each sparsity: distinct numbers, falling, `total` first.

    They are rounded to a multiple of `multiple`; only the total stays as it is.
    """
    counts = {min(total, max(0, round((1.0 - s) * total / multiple) * multiple)) for s in sparsities}
    return tuple(sorted(counts | {total}, reverse=True))
