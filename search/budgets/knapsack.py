"""The allocation of least total loss that a budget allows, where losses add up over units.

With one limit, dynamic programming over costs. It is exact where the costs have a large common divisor, as those of
equal blocks have, or where few allocations can still be the best; elsewhere (hundreds of units of odd sizes,
nanoseconds) each unit's cost is rounded up by at most 1/200,000 of the budget. With several limits, or where it must be
quick, Lagrange multipliers price each limit, every unit takes its cheapest level at those prices, and what is left is
spent greedily.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import gcd

import numpy as np

from search.budgets.budget import Budget, Costs, Limit, costs_of
from search.budgets.sums import Wanted, least
from supernet.errors import InputError
from supernet.space import Allocation, Space

CELLS = 200_000  # of the knapsack's table; costs whose common divisor is too small for that are rounded up
HALVINGS = 40  # of the interval that a price lies in
FINE = 1 / 256  # between the sparsities that are tried for a uniform allocation
SWEEPS = 4  # over the limits, whose prices depend on each other

EXCHANGED = 600  # levels that may be exchanged in pairs: those of least difference in loss, where there are more

Change = tuple[tuple[int, int], ...]  # units and their new levels
Losses = Sequence[np.ndarray]  # of each level of each unit


def uniform(space: Space, budget: Budget) -> Allocation:
    """Return the allocation that gives every unit the same sparsity, as evenly as its levels allow.

    Where the wanted sparsity falls between two levels, units of a kind and size take turns over depth so that their
    running total follows the wanted one; the knapsack then moves as little as it can to meet the budget. Sparsity is
    that of the costs that the leading limit counts, which for bit widths include scales and zeros; but no latency falls
    as evenly as the parameters do, and with one the sparsity is the smallest that keeps all limits.
    """
    limit = budget.leading
    costs, dense, sparsity = limit.costs, limit.dense, 1.0 - limit.target / limit.dense
    if any(one.kind == "latency" for one in budget.limits):
        costs, dense = costs_of(space), space.dense_cost
        sparsity = next((s for s in np.arange(0.0, 1.0, FINE) if budget.fits(_in_turns(space, costs, s))), 1.0)
    wish = _in_turns(space, costs, sparsity)
    # What must give way for the budget: distance to the wish alone would as soon take a unit's second step as another's
    # first.
    shares = [(1.0 - sparsity) * row[0] for row in costs]
    both = zip(_distances(costs, dense, _chosen(costs, wish)), _distances(costs, dense, shares), strict=True)
    return knapsack([a + 1e-3 * b for a, b in both], budget)


def _in_turns(space: Space, costs: Costs, sparsity: float) -> Allocation:
    """Choose for each unit a level near the sparsity, so that units of one kind and size have it on average."""
    found = [0] * len(space.units)
    owed: dict[tuple[str, int], float] = defaultdict(float)
    for index, (unit, row) in enumerate(zip(space.units, costs, strict=True)):
        alike = unit.kind, row[0]
        removed = 1.0 - np.array(row) / max(1, row[0])
        owed[alike] += sparsity
        away = np.abs(removed - owed[alike]).round(9)
        found[index] = int(np.flatnonzero(away == away.min())[-1])  # the sparser of two as near
        owed[alike] -= removed[found[index]]
    return tuple(found)


def closest(wish: Allocation, budget: Budget) -> Allocation:
    """Return the allocation nearest to `wish` that meets the budget, or the fullest one that fits where none meets it.

    Distance is the sum over units of the squared difference in what the leading limit counts.
    """
    costs, dense = budget.leading.costs, budget.leading.dense
    return knapsack(_distances(costs, dense, _chosen(costs, wish)), budget)


def _chosen(costs: Costs, allocation: Sequence[int]) -> list[float]:
    return [float(row[level]) for row, level in zip(costs, allocation, strict=True)]


def _distances(costs: Costs, dense: int, wanted: Sequence[float]) -> list[np.ndarray]:
    """Return for each unit the squared distance of each level's cost from a wanted one, as shares of the dense cost."""
    return [((np.array(row) - cost) / dense) ** 2 for row, cost in zip(costs, wanted, strict=True)]


def knapsack(losses: Losses, budget: Budget) -> Allocation:
    """Return the allocation of least total loss among those that meet the budget, or the fullest that fits where none
    does.

    With one limit it is exact unless costs had to be rounded and too many allocations come near the best for telling
    them apart; then, and with several limits, it is near that.

    Args:
        losses: For each unit the loss of each of its levels.
        budget: Its limits; InputError where even the sparsest levels exceed one.
    """
    for limit in budget.limits:
        if limit.lowest > limit.target:
            raise InputError(f"no allocation meets the budget ({limit}); ask for less, or raise supernet.levels")
    return _of_one(losses, budget) if len(budget.limits) == 1 else _of_several(losses, budget)


def _of_several(losses: Losses, budget: Budget) -> Allocation:
    """Solve for several limits by their prices.

    Where that leaves too much of the budget, each limit in turn is solved exactly at the prices of the others, and the
    best result is taken.
    """
    found = [relaxed(losses, budget)]
    if not budget.met(found[0]):
        padded, prices = _padded(losses), _prices(losses, budget)
        for index, limit in enumerate(budget.limits):
            priced = _priced(padded, budget, [0.0 if n == index else price for n, price in enumerate(prices)])
            of_units = [row[: len(loss)] for row, loss in zip(priced, losses, strict=True)]
            found.append(_of_one(of_units, Budget((limit,))))
    fitting = [allocation for allocation in found if budget.fits(allocation)]
    return min(
        fitting, key=lambda one: (max(1.0, budget.left(one)), sum(loss[i] for loss, i in zip(losses, one, strict=True)))
    )


def _of_one(losses: Losses, budget: Budget) -> Allocation:
    """Solve for one limit by dynamic programming over a table of costs.

    Where costs had to be rounded for the table, all sums of costs are listed instead, if they are few enough.
    """
    limit = budget.first
    divisor = max(1, gcd(*(cost for costs in limit.costs for cost in costs)))
    cell = max(divisor, -(-limit.target // CELLS))
    found = _by_table(losses, budget, cell)
    if cell == divisor:
        return found
    met = [_total(losses, one) for one in (found, relaxed(losses, budget)) if budget.met(one)]
    scale = max(float(np.abs(loss[np.isfinite(loss)]).max(initial=0.0)) for loss in losses)
    worst = min(met) + 1e-9 * len(losses) * scale if met else float("inf")  # sums are rounded in another order below
    (price,) = _prices(losses, budget)
    wanted = Wanted(limit.target - limit.smallest_step + 1, limit.target, worst, price / limit.dense)
    return least(losses, limit.costs, wanted) or found


def _by_table(losses: Losses, budget: Budget, cell: int) -> Allocation:
    """Fill a table with the least loss at each cost, in cells of `cell`; a unit's cost is rounded up to whole cells."""
    limit = budget.first
    cells = limit.target // cell
    best = np.full(cells + 1, np.inf)
    best[0] = 0.0
    choices = []
    for costs, loss in zip(limit.costs, losses, strict=True):
        new, choice = np.full(cells + 1, np.inf), np.zeros(cells + 1, dtype=np.int16)
        for level, value in enumerate(loss):
            cost = -(-costs[level] // cell)
            if cost > cells:
                continue
            total = best[: cells + 1 - cost] + value
            better = total < new[cost:]
            new[cost:][better] = total[better]
            choice[cost:][better] = level
        best = new
        choices.append(choice)
    window = max(0, (limit.target - limit.smallest_step) // cell + 1)
    at = _fullest(best, window)
    allocation = tuple(len(costs) - 1 for costs in limit.costs) if at is None else _trace(limit, choices, at, cell)
    return spend_rest(losses, allocation, budget)


def _fullest(best: np.ndarray, window: int) -> int | None:
    """Return the cell of least loss from `window` on, or the fullest one below it; None where none can be reached."""
    if np.isfinite(best[window:]).any():
        return window + int(best[window:].argmin())
    reachable = np.flatnonzero(np.isfinite(best))
    return int(reachable[-1]) if len(reachable) else None


def _trace(limit: Limit, choices: Sequence[np.ndarray], at: int, cell: int) -> Allocation:
    levels = []
    for costs, choice in zip(reversed(limit.costs), reversed(choices), strict=True):
        level = int(choice[at])
        levels.append(level)
        at -= -(-costs[level] // cell)
    return tuple(reversed(levels))


def _total(losses: Losses, allocation: Allocation) -> float:
    return float(sum(loss[level] for loss, level in zip(losses, allocation, strict=True)))


def relaxed(losses: Losses, budget: Budget) -> Allocation:
    """Return an allocation of nearly least total loss, by Lagrange multipliers and then greedily.

    A unit's level is never better than what the prices make of it, so only convex trade-offs are found: near the
    optimum, and thousands of times as fast as dynamic programming. Arguments as for `knapsack`.
    """
    levels = _priced(_padded(losses), budget, _prices(losses, budget)).argmin(1)
    allocation = tuple(int(level) for level in levels)
    if not budget.fits(allocation):  # prices of several limits that did not settle
        allocation = tuple(len(loss) - 1 for loss in losses)
    return spend_rest(losses, allocation, budget)


def _prices(losses: Losses, budget: Budget) -> list[float]:
    """Return for each limit a price at which the levels that are cheapest, price included, keep it."""
    padded = _padded(losses)
    prices = [0.0] * len(budget.limits)
    scale = float(np.ptp(padded[np.isfinite(padded)])) or 1.0
    highest = 1e6 * scale * len(losses)
    for _ in range(1 if len(prices) == 1 else SWEEPS):
        for index, limit in enumerate(budget.limits):
            prices[index] = 0.0
            others = _priced(padded, budget, prices)
            prices[index] = _price(others, limit.table / limit.dense, limit.target / limit.dense, highest)
    return prices


def _priced(padded: np.ndarray, budget: Budget, prices: Sequence[float]) -> np.ndarray:
    """Return the losses with what each level takes of each limit added at that limit's price."""
    for price, limit in zip(prices, budget.limits, strict=True):
        padded = padded + price * limit.table / limit.dense
    return padded


def _price(losses: np.ndarray, table: np.ndarray, target: float, highest: float) -> float:
    """Return the lowest price, within rounding, at which the cheapest levels keep a limit."""
    units = np.arange(len(losses))

    def keeps(price: float) -> bool:
        return bool(table[units, (losses + price * table).argmin(1)].sum() <= target * (1 + 1e-12))

    if keeps(0.0):
        return 0.0
    low, high = 1e-12 * highest, highest
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _padded(losses: Losses) -> np.ndarray:
    """Return the losses as (units, most levels), infinite where a unit has no such level."""
    padded = np.full((len(losses), max(len(loss) for loss in losses)), np.inf)
    for row, loss in zip(padded, losses, strict=True):
        row[: len(loss)] = loss
    return padded


def spend_rest(losses: Losses, allocation: Allocation, budget: Budget) -> Allocation:
    """Spend what is left of the budget by the denser levels that cost least loss, until less than a smallest step is
    left.

    Where no single unit can become denser before that, two of them change at once, so that less is left.
    """
    padded = _padded(losses)
    levels = np.array(allocation)
    for _ in range(levels.size * padded.shape[1]):  # each step leaves less, but not all need be taken
        if budget.left(levels.tolist()) < 1:
            break
        change = _denser(padded, levels, budget) or _exchange(padded, levels, budget)
        if change is None:
            break
        for unit, level in change:
            levels[unit] = level
    return tuple(int(level) for level in levels)


def _denser(padded: np.ndarray, levels: np.ndarray, budget: Budget) -> Change | None:
    """Return the unit and denser level that cost least loss among those the budget still allows; None where none is."""
    units = np.arange(len(levels))
    able = np.arange(padded.shape[1]) < levels[:, None]
    for limit in budget.limits:
        able &= limit.table - limit.table[units, levels][:, None] <= limit.target - limit.cost(levels.tolist())
    if not able.any():
        return None
    worse = np.where(able, padded - padded[units, levels][:, None], np.inf)
    unit, level = np.unravel_index(int(worse.argmin()), worse.shape)
    return ((int(unit), int(level)),)


def _exchange(padded: np.ndarray, levels: np.ndarray, budget: Budget) -> Change | None:
    """Return new levels of two units that together leave less of the budget.

    Those of least loss where a pair meets the budget, else the pair that leaves least; None where none leaves less.
    """
    units = np.arange(len(levels))
    worse = padded - padded[units, levels][:, None]
    unit, level = np.nonzero(np.isfinite(worse) & (np.arange(padded.shape[1]) != levels[:, None]))
    few = np.argsort(np.abs(worse[unit, level]), kind="stable")[:EXCHANGED]
    unit, level = unit[few], level[few]
    left = np.full((len(unit), len(unit)), np.inf)
    for limit in budget.limits:
        more = limit.table[unit, level] - limit.table[unit, levels[unit]]
        rest = limit.target - limit.cost(levels.tolist())
        left = np.minimum(left, (rest - more[:, None] - more) / limit.smallest_step)
    able = (unit[:, None] != unit) & (left >= 0) & (left < budget.left(levels.tolist()))
    if not able.any():
        return None
    meets = able & (left < 1)
    value = worse[unit, level][:, None] + worse[unit, level] if meets.any() else left
    one, other = np.unravel_index(int(np.where(meets if meets.any() else able, value, np.inf).argmin()), left.shape)
    return (int(unit[one]), int(level[one])), (int(unit[other]), int(level[other]))
