"""Budgets are met exactly: the knapsack is the brute force over all allocations, and never above the budget."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search import budget as budget_module
from search.budget import Budget, closest, knapsack, uniform
from supernet.errors import InputError
from supernet.prunables import BITS, WEIGHTS
from supernet.space import Allocation, Level, Space, Unit

SpaceOf = Callable[..., Space]
SPACES = st.builds(dict, seed=st.integers(0, 10_000), units=st.integers(1, 5), levels=st.integers(2, 4))


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
    affordable = [a for a in every_allocation(space) if space.cost(a) <= budget.target]
    met = [a for a in affordable if budget.met(space, a)]
    found = knapsack(space, losses, budget)
    if met:
        assert budget.met(space, found)
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

    found = closest(space, wish, budget)
    assert space.cost(found) <= budget.target
    met = [distance(a) for a in every_allocation(space) if budget.met(space, a)]
    if met:
        assert budget.met(space, found)
        assert distance(found) == min(met)
    if budget.met(space, wish):
        assert found == wish


@settings(deadline=None, max_examples=100)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99))
def test_uniform_meets_the_budget(random_space: SpaceOf, described: dict[str, int], sparsity: float) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    cost = space.cost(uniform(space, budget))
    assert cost <= budget.target
    if any(budget.met(space, a) for a in every_allocation(space)):
        assert budget.target - cost < max(1, space.smallest_step)


@settings(deadline=None, max_examples=50)
@given(described=SPACES, sparsity=st.floats(0.01, 0.99), cells=st.integers(20, 60))
def test_a_coarse_table_is_never_above_the_budget(
    random_space: SpaceOf, described: dict[str, int], sparsity: float, cells: int
) -> None:
    space = random_space(**described)
    budget = draw_budget(space, sparsity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_module, "CELLS", cells)
        found = knapsack(space, [np.zeros(len(unit.levels)) for unit in space.units], budget)
    assert space.cost(found) <= budget.target
    gaps = [unit.levels[i - 1].cost - unit.levels[i].cost for unit, i in zip(space.units, found, strict=True) if i]
    assert all(gap > budget.target - space.cost(found) for gap in gaps)  # no unit could be a level denser


TRANSFORMER = [(1000, (8, 7, 6, 5, 4, 3, 2, 1, 0)), (30, (256, 224, 192, 160, 128, 96, 64, 32, 0))] * 6


@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.5, 0.625])
def test_uniform_is_the_same_level_everywhere_where_the_grid_has_it(space_of: SpaceOf, sparsity: float) -> None:
    space = space_of(*TRANSFORMER)
    assert uniform(space, Budget.from_sparsity(sparsity, space)) == (round(sparsity * 8),) * 12


@pytest.mark.parametrize("sparsity", [0.05, 0.17, 0.3125, 0.44, 0.7])
def test_uniform_spreads_what_the_grid_has_not(space_of: SpaceOf, sparsity: float) -> None:
    space = space_of(*TRANSFORMER)
    budget = Budget.from_sparsity(sparsity, space)
    allocation = uniform(space, budget)
    assert budget.met(space, allocation)
    for kind in (0, 1):
        sparsities = np.array([unit.sparsity(level) for unit, level in zip(space.units, allocation, strict=True)][kind::2])
        # Two neighbouring levels, and for the last bit of the budget a unit or two that are a level off.
        assert np.abs(sparsities - sparsity).max() <= 0.125 + 0.0625
        assert abs(sparsities.mean() - sparsity) <= 0.125 / 6
        assert np.abs((sparsities - sparsity).cumsum()).max() <= 0.1875  # even over depth


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.2, float("nan"), float("inf")])
def test_budgets_outside_of_0_to_1_are_refused(space_of: SpaceOf, sparsity: float) -> None:
    with pytest.raises(InputError, match=r"budget\.sparsity=.* must lie between 0 and 1; 0\.5 removes half"):
        Budget.from_sparsity(sparsity, space_of(*TRANSFORMER))


def test_a_budget_above_the_highest_level_is_refused_with_the_highest(space_of: SpaceOf) -> None:
    space = space_of((10, (4, 3)), (1, (64, 32)))
    Budget.from_sparsity(0.4, space)
    with pytest.raises(InputError, match=r"budget\.sparsity=0\.5 cannot be met: all units .* remove 0\.4038; lower it"):
        Budget.from_sparsity(0.5, space)


def test_met(space_of: SpaceOf) -> None:
    space = space_of((10, (4, 3, 2)), (7, (4, 2)))  # steps of 10 and 14
    budget = Budget(target=47, dense=68)
    costs = {allocation: space.cost(allocation) for allocation in every_allocation(space)}
    assert costs == {(0, 0): 68, (0, 1): 54, (1, 0): 58, (1, 1): 44, (2, 0): 48, (2, 1): 34}
    assert [allocation for allocation in costs if budget.met(space, allocation)] == [(1, 1)]


def test_the_knapsack_of_a_large_model_is_quick(space_of: SpaceOf) -> None:
    """64 blocks of odd sizes, whose costs have no common divisor that would make the table small."""
    space = space_of(*[(5_000_011, (8, 7, 6, 5, 4, 3, 2, 1, 0)), (12_289, (14336, 12544, 10752, 8960, 7168))] * 64)
    budget = Budget.from_sparsity(0.3, space)
    found = uniform(space, budget)
    assert space.cost(found) <= budget.target
    assert budget.target - space.cost(found) < space.smallest_step


# Bits

D_OUT, D_IN, GROUP, DENSE = 64, 256, 128, 16
PER_GROUP = DENSE + 8  # a scale and a zero


def bits_space(layers: int, widths: tuple[int, ...] = (8, 6, 4, 3, 2)) -> Space:
    """Linear layers of alternating sizes."""
    units = []
    for index in range(layers):
        d_out = D_OUT * (1 + index % 3)
        levels = [Level(DENSE, DENSE * d_out * D_IN)]
        levels += [Level(bits, d_out * (bits * D_IN + D_IN // GROUP * PER_GROUP)) for bits in widths]
        units.append(Unit(f"layer.{index}", BITS, DENSE, tuple(levels)))
    return Space(tuple(units))


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.1, 4.1875, 4.25, 6, 8.2, 12])
def test_an_average_of_bits_counts_scales_and_zeros(bits: float) -> None:
    space = bits_space(12)
    weights = sum(unit.levels[0].cost for unit in space.units) // DENSE
    budget = Budget.from_sparsity(1 - bits / DENSE, space, "bits")
    assert budget.kind == "bits"
    assert budget.target == pytest.approx(bits * weights, abs=1)
    assert budget.dense == DENSE * weights
    allocation = uniform(space, budget)
    assert budget.met(space, allocation)
    average = space.cost(allocation) / weights
    assert average <= bits
    assert bits - average < space.smallest_step / weights + 1e-9


@pytest.mark.parametrize(("bits", "level"), [(16 - 1e-9, 0), (8.1875, 1), (6.1875, 2), (4.1875, 3), (3.1875, 4), (2.1875, 5)])
def test_uniform_bits_are_the_same_width_everywhere_where_it_costs_just_that(bits: float, level: int) -> None:
    """Of every 128 codes there are a scale of 16 and a zero of 8 bits: 0.1875 a code."""
    space = bits_space(6)
    allocation = uniform(space, Budget.from_sparsity(1 - bits / DENSE, space, "bits"))
    assert allocation == (level,) * 6 or (level == 0 and sum(allocation) == 1)  # one less than dense costs a level somewhere


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
    assert budget.met(space, allocation)
    levels = zip(space.units, allocation, strict=True)
    off = np.array([1 - unit.levels[level].cost / unit.levels[0].cost for unit, level in levels]) - sparsity
    assert (np.abs(off) <= 0.125).sum() >= 26  # one of the two levels around it, but for a few that meet the budget
    assert np.abs(off).max() <= 0.25


@pytest.mark.parametrize("sparsity", [0.3, 0.44])
def test_uniform_gives_layers_of_each_size_the_same_on_average(sparsity: float) -> None:
    """Taking turns over all layers, the small ones would all get one level here, and the large ones the next."""
    sizes = [64 * D_IN, 128 * D_IN] * 20
    units = [
        Unit(f"{i}", WEIGHTS, n, tuple(Level(n * k // 8, n * k // 8) for k in range(8, -1, -1))) for i, n in enumerate(sizes)
    ]
    space = Space(tuple(units))
    allocation = uniform(space, Budget.from_sparsity(sparsity, space))
    found = np.array([unit.sparsity(level) for unit, level in zip(units, allocation, strict=True)])
    assert np.abs(found.reshape(-1, 2).mean(0) - sparsity).max() < 0.02


def test_a_budget_below_the_narrowest_width_is_refused_in_bits() -> None:
    expected = r"budget\.bits=2 \(budget\.sparsity=0\.875\) cannot be met: .* take 2\.188 bits a weight, .*prune\.pruner\.bits$"
    with pytest.raises(InputError, match=expected):
        Budget.from_sparsity(1 - 2 / DENSE, bits_space(6), "bits")
