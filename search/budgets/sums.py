"""The least loss among all allocations of a few units: their sums of costs are listed, from both ends, and meet in the
middle.

What the knapsack does where costs have no common divisor that would keep its table small, and must be rounded for it.
Listing is exact and ends early where there are too many sums: `None`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supernet.space import Allocation

MOST = 200_000  # sums of half of the units: 10 units of 11 levels have fewer in any case


@dataclass(frozen=True)
class Wanted:
    """What is looked for, and what is known of it.

    Attributes:
        floor: The least cost of an allocation that is to be preferred to all below it.
        target: The most that any may cost.
        worst: Loss of the best allocation known from `floor` on; infinite where none is.
        price: Of a unit of cost, near that at which the cheapest levels cost just the target; any serves, a good one
            saves time.
    """

    floor: int
    target: int
    worst: float
    price: float


@dataclass(frozen=True)
class Half:
    """The sums of costs that some of the units can have, rising, with the least loss of each.

    Attributes:
        sums: (n,) int64.
        losses: (n,) float64.
        taken: For each unit, and each sum up to it, which sum before it and which level that comes from, as one number.
        counts: Of levels, for each unit.
    """

    sums: np.ndarray
    losses: np.ndarray
    taken: list[np.ndarray]
    counts: list[int]

    def levels(self, at: int) -> list[int]:
        """Return the level of each unit that the sum at index `at` comes from."""
        found = []
        for kept, count in zip(reversed(self.taken), reversed(self.counts), strict=True):
            at, level = divmod(int(kept[at]), count)
            found.append(level)
        return found[::-1]


def least(losses: Sequence[np.ndarray], costs: Sequence[Sequence[int]], wanted: Wanted) -> Allocation | None:
    """Return the allocation of least loss whose cost lies between `floor` and `target`.

    Where there is none, the one of highest cost below `floor`; None where the sums are too many to list.

    Args:
        losses: For each unit the loss of each of its levels.
        costs: And what each takes.
        wanted: What is looked for.
    """
    rows = [np.array(row, dtype=np.int64) for row in costs]
    middle = len(rows) // 2
    first = _half(losses, rows, range(middle), wanted)
    second = _half(losses, rows, range(middle, len(rows)), wanted) if first is not None else None
    if first is None or second is None:
        return None
    at = _meet(first, second, wanted)
    return None if at is None else (*first.levels(at[0]), *second.levels(at[1]))


def _half(losses: Sequence[np.ndarray], rows: Sequence[np.ndarray], units: range, wanted: Wanted) -> Half | None:
    """List the sums of costs of some of the units, without those that no choice for the other units can make use of.

    Left out are those from which the others cannot come between floor and target (where something is known to), and
    those whose loss is too high even if all others took the levels that are cheapest at the price: the Lagrangian
    bound.
    """
    floor = wanted.floor if np.isfinite(wanted.worst) else 0
    lowest, highest = sum(int(row.min()) for row in rows), sum(int(row.max()) for row in rows)
    priced = [float((loss + wanted.price * row).min()) for loss, row in zip(losses, rows, strict=True)]
    others = sum(priced)
    sums, values = np.zeros(1, dtype=np.int64), np.zeros(1)
    taken: list[np.ndarray] = []
    for unit in units:
        row, others = rows[unit], others - priced[unit]
        lowest, highest = lowest - int(row.min()), highest - int(row.max())
        sums, values = (sums[:, None] + row).ravel(), (values[:, None] + losses[unit]).ravel()
        bound = values + others - wanted.price * (wanted.target - sums)
        kept = np.flatnonzero((sums + lowest <= wanted.target) & (sums + highest >= floor) & (bound <= wanted.worst))
        kept = kept[np.lexsort((values[kept], sums[kept]))]
        kept = kept[np.diff(sums[kept], prepend=-1) > 0]  # the first of each sum has the least loss
        if not 0 < len(kept) <= MOST:
            return None
        sums, values = sums[kept], values[kept]
        taken.append(kept)
    return Half(sums, values, taken, [len(rows[unit]) for unit in units])


def _meet(first: Half, second: Half, wanted: Wanted) -> tuple[int, int] | None:
    """Return the index of the sum in each half that together make the best allocation; None where nothing fits."""
    last = np.searchsorted(second.sums, wanted.target - first.sums, side="right")  # behind the last that goes with each
    begin = np.searchsorted(second.sums, wanted.floor - first.sums, side="left")
    if (begin < last).any():
        smallest = _smallest(second.losses, begin, last)
        one = int((first.losses + smallest).argmin())
        return one, int(begin[one] + second.losses[begin[one] : last[one]].argmin())
    if not (last > 0).any():
        return None
    fullest = np.where(last > 0, first.sums + second.sums[last - 1], -1)
    one = int(np.where(fullest == fullest.max(), first.losses + second.losses[last - 1], np.inf).argmin())
    return one, int(last[one] - 1)


def _smallest(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The smallest of values[begin:end] for each pair; infinite where that is empty.

    Of a table that has the smallest of each 1, 2, 4, ... neighbours, two runs that overlap cover any stretch.
    """
    found = np.full(len(begin), np.inf)
    length, run, runs = end - begin, 1, values
    while (length >= run).any():
        here = (length >= run) & (length < 2 * run)
        found[here] = np.minimum(runs[begin[here]], runs[end[here] - run])
        if len(runs) <= run:
            break
        runs = np.minimum(runs[:-run], runs[run:])
        run *= 2
    return found
