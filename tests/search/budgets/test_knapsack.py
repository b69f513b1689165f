"""Allocations of least loss: the knapsack is the brute force over all allocations, and never above the budget."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search.budgets import knapsack as knapsack_module
from search.budgets import sums
from search.budgets.budget import Budget, Limit, costs_of
from search.budgets.knapsack import closest, knapsack, relaxed, uniform
from supernet.errors import InputError
from supernet.space import BITS, WEIGHTS, Allocation, Level, Space, Unit
from tests.search.synthetic import D_IN, DENSE_BITS, TRANSFORMER, SpaceOf, bits_space

SPACES: st.SearchStrategy[dict[str, int]] = st.builds(
    dict, seed=st.integers(0, 10_000), units=st.integers(1, 5), levels=st.integers(2, 4)
)


def every_allocation(space: Space) -> Iterable[Allocation]:
    return itertools.product(*(range(len(unit.levels)) for unit in space.units))


def total(losses: list[np.ndarray], allocation: Allocation) -> float:
    return float(sum(loss[level] for loss, level in zip(losses, allocation, strict=True)))


def draw_budget(space: Space, sparsity: float) -> Budget:
    assume(space.dense_cost * (1 - sparsity) >= space.lowest_cost + 1)
    return Budget.from_sparsity(sparsity, space)


@settings(deadline=None, max_examples=150)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99))
def test_knapsack_is_brute_force(random_space: SpaceOf, described: dict[str, int], sparsity: float) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    rng = np.random.default_rng(described["seed"])
    losses = [rng.random(len(unit.levels)) for unit in space.units]
    affordable = [a for a in every_allocation(space) if space.cost(a) <= budget.first.target]
    met = [a for a in affordable if budget.met(a)]
    found = knapsack(losses, budget)
    if met:
        assert budget.met(found)
        assert total(losses, found) == pytest.approx(min(total(losses, a) for a in met))
    else:  # then the fullest
        assert space.cost(found) == max(space.cost(a) for a in affordable)


@settings(deadline=None, max_examples=100)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99), data=st.data())
def test_closest_moves_as_little_as_it_can(
    random_space: SpaceOf, described: dict[str, int], sparsity: float, data: st.DataObject
) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    wish = tuple(data.draw(st.integers(0, len(unit.levels) - 1)) for unit in space.units)

    def distance(allocation: Allocation) -> int:
        levels = zip(space.units, allocation, wish, strict=True)
        return sum((unit.levels[a].cost - unit.levels[b].cost) ** 2 for unit, a, b in levels)

    found = closest(wish, budget)
    assert space.cost(found) <= budget.first.target
    met = [distance(a) for a in every_allocation(space) if budget.met(a)]
    if met:
        assert budget.met(found)
        assert distance(found) == min(met)
    if budget.met(wish):
        assert found == wish


@settings(deadline=None, max_examples=100)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99))
def test_uniform_meets_the_budget(random_space: SpaceOf, described: dict[str, int], sparsity: float) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    cost = space.cost(uniform(space, budget))
    assert cost <= budget.first.target
    if any(budget.met(a) for a in every_allocation(space)):
        assert budget.first.target - cost < max(1, budget.first.smallest_step)


@settings(deadline=None, max_examples=50)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99), cells=st.integers(20, 60))
def test_a_coarse_table_is_never_above_the_budget(
    random_space: SpaceOf, described: dict[str, int], sparsity: float, cells: int
) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack_module, "CELLS", cells)
        patch.setattr(sums, "MOST", 0)
        found = knapsack([np.zeros(len(unit.levels)) for unit in space.units], budget)
    assert space.cost(found) <= budget.first.target
    gaps = [unit.levels[i - 1].cost - unit.levels[i].cost for unit, i in zip(space.units, found, strict=True) if i]
    assert all(gap > budget.first.target - space.cost(found) for gap in gaps)  # no unit could be a level denser


@pytest.mark.parametrize("most", [200_000, 10], ids=["listed", "too many to list"])
def test_costs_without_a_common_divisor_are_not_rounded_away(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of the table is hundreds of parameters here: rounded to that, one in twelve answers was not the best."""
    monkeypatch.setattr(sums, "MOST", most)
    worse = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        largest = rng.integers(1_000_000, 60_000_000, 6)
        costs = tuple(tuple(sorted({int(c), *map(int, rng.integers(0, c, 5))}, reverse=True)) for c in largest)
        dense, lowest = sum(row[0] for row in costs), sum(row[-1] for row in costs)
        limit = Limit("parameters", int(rng.integers(lowest, dense + 1)), dense, costs)
        losses = [rng.random(len(row)) - 0.3 for row in costs]
        found = knapsack(losses, Budget((limit,)))
        all_costs = sum(np.ix_(*map(np.array, costs))).ravel()
        all_losses = sum(np.ix_(*losses)).ravel()
        met = (all_costs <= limit.target) & (all_costs > limit.target - limit.smallest_step)
        assert limit.cost(found) <= limit.target
        if met.any():
            best = limit.target - limit.cost(found) < limit.smallest_step
            worse += not best or total(losses, found) > all_losses[met].min() + 1e-9
        else:
            worse += limit.cost(found) != all_costs[all_costs <= limit.target].max()
    assert (worse == 0) == (most > 10)  # where they are too many, the rounded answer has to do


SIX_BLOCKS = TRANSFORMER[:2] * 6


@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.5, 0.625])
def test_uniform_is_the_same_level_everywhere_where_the_grid_has_it(space_of: SpaceOf, sparsity: float) -> None:
    space = space_of(*SIX_BLOCKS)
    assert uniform(space, Budget.from_sparsity(sparsity, space)) == (round(sparsity * 8),) * 12


@pytest.mark.parametrize("sparsity", [0.05, 0.17, 0.3125, 0.44, 0.7])
def test_uniform_spreads_what_the_grid_has_not(space_of: SpaceOf, sparsity: float) -> None:
    space = space_of(*SIX_BLOCKS)
    budget = Budget.from_sparsity(sparsity, space)
    allocation = uniform(space, budget)
    assert budget.met(allocation)
    for kind in (0, 1):
        sparsities = np.array(
            [unit.sparsity(level) for unit, level in zip(space.units, allocation, strict=True)][kind::2]
        )
        # Two neighbouring levels, and for the last bit of the budget a unit or two that are a level off.
        assert np.abs(sparsities - sparsity).max() <= 0.125 + 0.0625
        assert abs(sparsities.mean() - sparsity) <= 0.125 / 6
        assert np.abs((sparsities - sparsity).cumsum()).max() <= 0.1875  # even over depth


def test_the_knapsack_of_a_large_model_is_quick(space_of: SpaceOf) -> None:
    """64 blocks of odd sizes, whose costs have no common divisor that would make the table small."""
    space = space_of(*[(5_000_011, (8, 7, 6, 5, 4, 3, 2, 1, 0)), (12_289, (14336, 12544, 10752, 8960, 7168))] * 64)
    budget = Budget.from_sparsity(0.3, space)
    found = uniform(space, budget)
    assert space.cost(found) <= budget.first.target
    assert budget.first.target - space.cost(found) < budget.first.smallest_step


# Several limits


@st.composite
def several_limits(draw: st.DrawFn) -> tuple[Budget, list[np.ndarray]]:
    """Limits whose costs have nothing to do with each other, and losses that grow ever faster with sparsity."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    limits = []
    for index in range(draw(st.integers(1, 3))):
        costs = tuple(tuple(sorted((int(c) for c in rng.integers(0, 60, count)), reverse=True)) for count in counts)
        dense, lowest = sum(row[0] for row in costs), sum(row[-1] for row in costs)
        assume(dense > 0)
        limits.append(Limit(str(index), int(rng.integers(lowest, dense + 1)), dense, costs))
    losses = [np.concatenate([[0.0], np.cumsum(np.sort(rng.random(count - 1)))]) for count in counts]
    return Budget(tuple(limits)), losses


@settings(deadline=None, max_examples=200)
@given(drawn=several_limits(), solver=st.sampled_from([knapsack, relaxed]))
def test_several_limits_are_all_kept(drawn: tuple[Budget, list[np.ndarray]], solver: Callable[..., Allocation]) -> None:
    budget, losses = drawn
    found = solver(losses, budget)
    for limit in budget.limits:
        assert sum(row[level] for row, level in zip(limit.costs, found, strict=True)) <= limit.target
    if not budget.met(found):  # no unit could be a level denser
        for unit, level in enumerate(found):
            if level:
                assert not budget.fits([*found[:unit], level - 1, *found[unit + 1 :]])


def test_several_limits_are_solved_nearly_as_well_as_by_brute_force(random_space: SpaceOf) -> None:
    """On average, as a random allocation may be bad luck."""
    excess, unmet, cases = [], 0, 0
    for seed in range(150):
        space, rng = random_space(seed, 5, 4), np.random.default_rng(seed)
        second = tuple(
            tuple(sorted((int(c) for c in rng.integers(0, 50, len(row))), reverse=True)) for row in costs_of(space)
        )
        limits = []
        for costs in (costs_of(space), second):
            dense, lowest = sum(row[0] for row in costs), sum(row[-1] for row in costs)
            limits.append(Limit("costs", int(rng.integers(lowest, dense + 1)), max(1, dense), costs))
        budget = Budget(tuple(limits))
        losses = [np.concatenate([[0.0], np.cumsum(np.sort(rng.random(len(unit.levels) - 1)))]) for unit in space.units]
        met = [allocation for allocation in every_allocation(space) if budget.met(allocation)]
        if met:
            found = knapsack(losses, budget)
            cases, unmet = cases + 1, unmet + (not budget.met(found))
            excess.append(total(losses, found) - min(total(losses, allocation) for allocation in met))
    assert cases > 100
    assert unmet <= 0.1 * cases
    assert np.mean(excess) < 0.1  # the losses of a unit's levels lie between 0 and 3


@settings(deadline=None, max_examples=100)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99))
def test_prices_come_near_the_optimum_of_convex_losses(
    random_space: SpaceOf, described: dict[str, int], sparsity: float
) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    rng = np.random.default_rng(described["seed"])
    losses = [np.concatenate([[0.0], np.cumsum(np.sort(rng.random(len(unit.levels) - 1)))]) for unit in space.units]
    found = relaxed(losses, budget)
    assert budget.fits(found)
    fitting = [total(losses, a) for a in every_allocation(space) if budget.fits(a)]
    steepest = max((float(np.diff(loss).max(initial=0.0)) * len(loss) for loss in losses), default=0.0)
    assert total(losses, found) <= min(fitting) + 2 * steepest  # a level or two away from what prices cannot reach


def test_prices_are_quick_where_a_model_has_hundreds_of_units(space_of: SpaceOf) -> None:
    space = space_of(*[(5_000_011, (8, 7, 6, 5, 4, 3, 2, 1, 0)), (12_289, (14336, 12544, 10752, 8960, 7168))] * 200)
    budget = Budget.from_sparsity(0.3, space)
    rng = np.random.default_rng(0)
    found = relaxed([np.sort(rng.random(len(unit.levels))) for unit in space.units], budget)
    assert budget.met(found)


def test_uniform_under_a_latency_is_even_in_what_is_kept(space_of: SpaceOf) -> None:
    """Not in the time that is saved: heads save little of it until the last one goes."""
    space = space_of(*[(16, (8, 6, 4, 2, 0)), (16, (8, 6, 4, 2, 0))] * 4)
    costs = ((100, 98, 96, 94, 0), (400, 300, 200, 100, 0)) * 4
    budget = Budget((Limit("latency", 1176, 2000, costs, slack=10),))
    assert set(uniform(space, budget)) <= {1, 2, 3}
    assert budget.fits(uniform(space, budget))
    budget = Budget((Limit("latency", 1184, 2000, costs, slack=10), *Budget.from_sparsity(0.5, space).limits))
    assert uniform(space, budget) == (2,) * 8


def test_a_limit_below_the_sparsest_levels_is_refused() -> None:
    with pytest.raises(InputError, match=r"no allocation meets the budget \(3 of 10 prunable flops to keep, 30\.0%\)"):
        knapsack([np.zeros(2)], Budget((Limit("flops", 3, 10, ((10, 4),)),)))


# Bits


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.1, 4.1875, 4.25, 6, 8.2, 12])
def test_an_average_of_bits_counts_scales_and_zeros(bits: float) -> None:
    space = bits_space(12)
    weights = sum(unit.levels[0].cost for unit in space.units) // DENSE_BITS
    budget = Budget.from_sparsity(1 - bits / DENSE_BITS, space, "bits")
    assert budget.first.kind == "bits"
    assert budget.first.target == pytest.approx(bits * weights, abs=1)
    assert budget.first.dense == DENSE_BITS * weights
    allocation = uniform(space, budget)
    assert budget.met(allocation)
    average = space.cost(allocation) / weights
    assert average <= bits
    assert bits - average < budget.first.smallest_step / weights + 1e-9


@pytest.mark.parametrize(
    ("bits", "level"), [(16 - 1e-9, 0), (8.1875, 1), (6.1875, 2), (4.1875, 3), (3.1875, 4), (2.1875, 5)]
)
def test_uniform_bits_are_the_same_width_everywhere_where_it_costs_just_that(bits: float, level: int) -> None:
    """Of every 128 codes there are a scale of 16 and a zero of 8 bits: 0.1875 a code."""
    space = bits_space(6)
    allocation = uniform(space, Budget.from_sparsity(1 - bits / DENSE_BITS, space, "bits"))
    # one less than dense costs a level somewhere
    assert allocation == (level,) * 6 or (level == 0 and sum(allocation) == 1)


@pytest.mark.parametrize("sparsity", [0.3, 0.44, 0.5])
@pytest.mark.parametrize("kind", [BITS, WEIGHTS])
def test_uniform_is_even_over_layers_of_all_sizes(kind: str, sparsity: float) -> None:
    """No layer makes up for what a larger one cannot have."""
    if kind == BITS:
        space = bits_space(30, (14, 12, 10, 8, 6, 4, 2))
    else:
        sizes = [size * D_IN for size in (64, 16, 16, 64, 256, 256)] * 5
        of_size = {size: tuple(Level(size * k // 8, size * k // 8) for k in range(8, -1, -1)) for size in sizes}
        space = Space(tuple(Unit(f"layer.{i}", WEIGHTS, size, of_size[size]) for i, size in enumerate(sizes)))
    budget = Budget.from_sparsity(sparsity, space)
    allocation = uniform(space, budget)
    assert budget.met(allocation)
    levels = zip(space.units, allocation, strict=True)
    off = np.array([1 - unit.levels[level].cost / unit.levels[0].cost for unit, level in levels]) - sparsity
    assert (np.abs(off) <= 0.125).sum() >= 26  # one of the two levels around it, but for a few that meet the budget
    assert np.abs(off).max() <= 0.25


@pytest.mark.parametrize("sparsity", [0.3, 0.44])
def test_uniform_gives_layers_of_each_size_the_same_on_average(sparsity: float) -> None:
    """Taking turns over all layers, the small ones would all get one level here, and the large ones the next."""
    sizes = [64 * D_IN, 128 * D_IN] * 20
    units = [
        Unit(f"{i}", WEIGHTS, n, tuple(Level(n * k // 8, n * k // 8) for k in range(8, -1, -1)))
        for i, n in enumerate(sizes)
    ]
    space = Space(tuple(units))
    allocation = uniform(space, Budget.from_sparsity(sparsity, space))
    found = np.array([unit.sparsity(level) for unit, level in zip(units, allocation, strict=True)])
    assert np.abs(found.reshape(-1, 2).mean(0) - sparsity).max() < 0.02
