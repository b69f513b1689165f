"""Grids of levels: coarse first, then half as wide around what was found; mixtures weigh what levels keep."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.run.levels import ACCUMULATIONS, Grid, Mixture, Window, check_accumulation, exact, mixture
from supernet.errors import InputError
from supernet.models.prunables import Prunable
from supernet.space import BITS, WEIGHTS, Allocation, Level, Space


def members(multiple: int = 32) -> tuple[Prunable, ...]:
    """Two blocks of 4 KV groups and 256 neurons."""
    found = []
    for block in range(2):
        found += [
            Prunable(f"{block}.attention", "attention", 4, 3072),
            Prunable(f"{block}.mlp", "mlp", 256, 192, multiple),
        ]
    return tuple(found)


def choices(*costs: int, kind: str = BITS) -> Prunable:
    """A unit with fixed levels, that keep less and less."""
    levels = tuple(Level(len(costs) - index, cost) for index, cost in enumerate(costs))
    return Prunable(f"{kind}.{costs}", kind, len(costs), costs[0] // len(costs), 1, levels)


FIXED = (choices(1000, 500, 300, 120), choices(90, 50), choices(640, 0, kind="block"))


def counts(space: Space, kind: str) -> list[int]:
    (levels,) = {unit.levels for unit in space.units if unit.kind == kind}
    return [level.kept for level in levels]


def all_kept(prunables: Sequence[Prunable], attention: int, mlp: int) -> dict[str, int]:
    return {p.name: attention if p.kind == "attention" else mlp for p in prunables}


def dense_of(space: Space) -> Allocation:
    return (0,) * len(space.units)


def expectation(window: Window, kind: str) -> tuple[float, ...]:
    """Weights of a kind's levels, which are the same for all of its units."""
    found = mixture(window, "expectation", dense_of(window.space))
    (weights,) = {found[unit.name] for unit in window.space.units if unit.kind == kind}
    return weights


# Grids


def test_the_first_grid_covers_everything() -> None:
    window = Grid(9, 0.125).first(members())
    assert counts(window.space, "attention") == [4, 3, 2, 1, 0]  # more levels than groups are merged
    assert counts(window.space, "mlp") == [256, 224, 192, 160, 128, 96, 64, 32, 0]
    assert [(u.name, u.kind, u.total) for u in window.space.units] == [(p.name, p.kind, p.total) for p in members()]
    assert window.dense == {p.name for p in members()}
    assert expectation(window, "attention") == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_levels_cost_what_their_members_cost() -> None:
    for unit, one in zip(Grid(9, 0.125).first(members()).space.units, members(), strict=True):
        assert all(level.cost == level.kept * one.each for level in unit.levels)


def test_sparsities_end_at_one() -> None:
    assert counts(Grid(9, 0.3).first(members()).space, "mlp") == [256, 192, 96, 32, 0]  # 0.3, 0.6, 0.9, then 1


@pytest.mark.parametrize(
    ("lowest", "expected", "holds_dense"),
    [
        (0.0, [256, 192, 128, 64, 0], True),
        (0.25, [256, 192, 128, 64, 0], False),
        (0.5, [256, 128, 64, 0], False),
        (0.01, [256, 192, 128, 64, 0], True),  # 0.01 of 256 rounds to none
        (0.9, [256, 24, 0], False),
    ],
)
def test_the_first_grid_may_begin_sparser(lowest: float, expected: list[int], holds_dense: bool) -> None:
    window = Grid(5, 0.25, lowest).first(members(8))
    assert counts(window.space, "mlp") == expected  # the dense level is always there
    assert ("0.mlp" in window.dense) == holds_dense
    window_counts = expected if holds_dense else [0, *expected[1:]]
    assert expectation(window, "mlp") == pytest.approx([count / sum(window_counts) for count in window_counts])


def test_later_grids_halve_the_spacing_around_what_was_found() -> None:
    grid, kept = Grid(5, 0.25), all_kept(members(1), 2, 128)
    for refinement, spacing in ((1, 32), (2, 16), (3, 8)):
        window = grid.around(members(1), kept, refinement)
        levels = [128 + k * spacing for k in (2, 1, 0, -1, -2)]
        assert counts(window.space, "mlp") == [256, *levels]  # every unit has its dense level, too
        # not in the window
        assert expectation(window, "mlp") == pytest.approx([0.0, *(count / sum(levels) for count in levels)])


def test_later_grids_do_not_depend_on_the_lowest_of_the_first() -> None:
    kept = all_kept(members(1), 2, 128)
    assert Grid(5, 0.25, 0.5).around(members(1), kept, 1) == Grid(5, 0.25).around(members(1), kept, 1)


def test_a_window_at_the_dense_end_counts_the_dense_level() -> None:
    window = Grid(5, 0.25).around(members(), all_kept(members(), 4, 224), 1)
    assert counts(window.space, "mlp") == [256, 224, 192, 160]
    assert expectation(window, "mlp") == pytest.approx([256 / 832, 224 / 832, 192 / 832, 160 / 832])


def test_a_window_at_the_other_end_holds_nothing_but_sparse_levels() -> None:
    window = Grid(5, 0.25).around(members(), all_kept(members(), 0, 0), 1)
    assert counts(window.space, "mlp") == [256, 64, 32, 0]
    assert expectation(window, "mlp") == pytest.approx([0.0, 2 / 3, 1 / 3, 0.0])
    narrow = Grid(2, 0.125).around(members(), all_kept(members(), 0, 0), 3)
    assert counts(narrow.space, "mlp") == [256, 0]
    assert expectation(narrow, "mlp") == (0.0, 1.0)  # the next sub-block sees that this one is gone


@settings(deadline=None, max_examples=60)
@given(
    levels=st.integers(2, 17),
    step=st.floats(0.01, 0.99),
    lowest=st.floats(0, 0.99),
    multiple=st.sampled_from([1, 32, 48, 256]),
    refinement=st.integers(0, 4),
    choice=st.randoms(use_true_random=False),
)
def test_every_round_offers_what_was_found(
    levels: int, step: float, lowest: float, multiple: int, refinement: int, choice: object
) -> None:
    grid, prunables = Grid(levels, step, lowest), (*members(multiple), *FIXED)
    first = grid.first(prunables)
    allocation = tuple(choice.randrange(len(unit.levels)) for unit in first.space.units)  # type: ignore[attr-defined]
    kept = first.space.kept(allocation)
    later = grid.around(prunables, kept, refinement)
    assert later.space.kept(later.space.nearest(kept)) == kept
    for window in (first, later):
        for accumulation in ACCUMULATIONS:
            assert_is_a_mixture(window.space, mixture(window, accumulation, window.space.nearest(kept)))
        for unit in window.space.units[:4]:
            assert len(unit.levels) <= levels + 2
            assert unit.kind == "attention" or all(level.kept % multiple == 0 for level in unit.levels[1:])


def assert_is_a_mixture(space: Space, weights: Mixture) -> None:
    assert list(weights) == [unit.name for unit in space.units]
    for unit in space.units:
        of_levels = weights[unit.name]
        assert len(of_levels) == len(unit.levels)
        assert min(of_levels) >= 0
        assert sum(of_levels) == pytest.approx(1)


def test_fixed_choices_are_the_levels_of_every_round() -> None:
    grid = Grid(3, 0.25, 0.5)
    first = grid.first(FIXED)
    assert [unit.levels for unit in first.space.units] == [p.choices for p in FIXED]
    assert first.dense == {p.name for p in FIXED}
    kept = first.space.kept((2, 1, 1))
    for refinement in (1, 2):
        assert grid.around(FIXED, kept, refinement) == first


# What the next sub-block sees


def test_without_accumulation_the_dense_model_is_seen() -> None:
    window = Grid(5, 0.25, 0.25).first((*members(), *FIXED))
    found = mixture(window, "none", tuple(len(unit.levels) - 1 for unit in window.space.units))
    assert all(weights[0] == 1 and not any(weights[1:]) for weights in found.values())


def test_chosen_is_the_allocation_known_so_far() -> None:
    window = Grid(5, 0.25).first((*members(), *FIXED))
    around = tuple(index % len(unit.levels) for index, unit in enumerate(window.space.units))
    found = mixture(window, "chosen", around)
    assert [weights.index(1.0) for weights in found.values()] == list(around)
    assert all(sum(weights) == 1.0 for weights in found.values())


def test_the_expectation_of_fixed_choices_is_in_proportion_to_what_they_keep() -> None:
    found = mixture(Grid(5, 0.25, 0.5).first(FIXED), "expectation", (0, 0, 0))
    assert list(found.values()) == [
        pytest.approx([0.4, 0.3, 0.2, 0.1]),
        pytest.approx([2 / 3, 1 / 3]),
        pytest.approx([2 / 3, 1 / 3]),
    ]


def test_a_block_that_is_present_or_not_is_seen_as_present() -> None:
    """What keeps nothing has no weight: the expectation of presence alone is the dense model."""
    block = Prunable("block", "block", 1, 100, 1, (Level(1, 100), Level(0, 0)))
    assert mixture(Grid(5, 0.25).first([block]), "expectation", (1,)) == {"block": (1.0, 0.0)}


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_a_unit_without_a_choice_is_seen_as_it_is(accumulation: str) -> None:
    window = Grid(5, 0.25, 0.5).first([choices(10)])
    assert list(mixture(window, accumulation, (0,)).values()) == [(1.0,)]


@pytest.mark.parametrize("accumulation", ["", "foo", "None", "all"])
def test_unknown_accumulations_are_refused(accumulation: str) -> None:
    with pytest.raises(
        InputError, match=f"^prune.accumulation={accumulation} is not known; choose one of none, chosen, expec"
    ):
        check_accumulation(accumulation)


# The last rebuild


@pytest.mark.parametrize(("accumulation", "seen"), [("none", 0), ("chosen", -1), ("expectation", -1)])
def test_the_last_rebuild_has_one_allocation_to_choose(accumulation: str, seen: int) -> None:
    kept = dict(zip((p.name for p in members()), (4, 96, 0, 256), strict=True))
    space, weights = exact(members(), kept, accumulation)
    assert [[level.kept for level in unit.levels] for unit in space.units] == [[4], [256, 96], [4, 0], [256]]
    assert space.kept([len(unit.levels) - 1 for unit in space.units]) == kept
    assert_is_a_mixture(space, weights)
    assert all(of_levels[seen] == 1.0 for of_levels in weights.values())


def test_the_last_rebuild_of_fixed_choices_costs_what_they_cost() -> None:
    """Costs of bit widths are not in proportion to the bits: scales and zeros count."""
    space, _ = exact(FIXED, {p.name: kept for p, kept in zip(FIXED, (2, 2, 1), strict=True)}, "chosen")
    assert [unit.levels for unit in space.units] == [
        (Level(4, 1000), Level(2, 300)),
        (Level(2, 90),),
        (Level(2, 640), Level(1, 0)),
    ]


def test_the_last_rebuild_has_the_cost_of_the_allocation_found() -> None:
    window = Grid(5, 0.25).first((*members(), *FIXED))
    allocation = uniform(window.space, Budget.from_sparsity(0.4, window.space))
    space, _ = exact((*members(), *FIXED), window.space.kept(allocation), "chosen")
    assert sum(unit.levels[-1].cost for unit in space.units) == window.space.cost(allocation)


# Refusals


@pytest.mark.parametrize(
    ("levels", "step", "lowest", "wrong"),
    [
        (1, 0.125, 0.0, "levels=1"),
        (0, 0.125, 0.0, "levels=0"),
        (9, 0.0, 0.0, "step=0.0"),
        (9, 1.0, 0.0, "step=1.0"),
        (9, -0.5, 0.0, "step=-0.5"),
        (9, float("nan"), 0.0, "step=nan"),
        (9, 0.125, -0.1, "lowest=-0.1"),
        (9, 0.125, 1.0, "lowest=1.0"),
        (9, 0.125, float("nan"), "lowest=nan"),
    ],
)
def test_impossible_grids_are_refused(levels: int, step: float, lowest: float, wrong: str) -> None:
    with pytest.raises(
        InputError, match=rf"^supernet\.{wrong} must be .*; 9 levels of 0\.125 from 0 cover everything$"
    ):
        Grid(levels, step, lowest)


def test_weights_are_a_grid_unless_there_are_patterns() -> None:
    layer = Prunable("q", WEIGHTS, 64 * 32, 1, 32)
    (unit,) = Grid(3, 0.25).first([layer]).space.units
    assert [level.kept for level in unit.levels] == [64 * 32, 48 * 32, 32 * 32]
