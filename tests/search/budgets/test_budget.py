"""A budget says what an allocation may cost, and whether it comes near enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budgets.budget import Budget, Limit
from supernet.errors import InputError
from tests.search.synthetic import DENSE_BITS, TRANSFORMER, SpaceOf, bits_space


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.2, float("nan"), float("inf")])
def test_budgets_outside_of_0_to_1_are_refused(space_of: SpaceOf, sparsity: float) -> None:
    with pytest.raises(InputError, match=r"budget\.sparsity=.* must be at least 0 and below 1; 0\.5 removes half"):
        Budget.from_sparsity(sparsity, space_of(*TRANSFORMER))


def test_a_budget_above_the_highest_level_is_refused_with_the_highest(space_of: SpaceOf) -> None:
    space = space_of((10, (4, 3)), (1, (64, 32)))
    Budget.from_sparsity(0.4, space)
    with pytest.raises(InputError, match=r"budget\.sparsity=0\.5 cannot be met: all units .* remove 0\.4038; lower it"):
        Budget.from_sparsity(0.5, space)


@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_what_fits_exactly_is_within_the_budget(space_of: SpaceOf, percent: int) -> None:
    space = space_of((1, tuple(range(20, -1, -1))))
    assert Budget.from_sparsity(percent / 100, space).first.target == 20 - percent // 5


@pytest.mark.parametrize(("sparsity", "target"), [(0.51, 9), (0.54, 9), (0.01, 19), (0.0, 20)])
def test_what_does_not_divide_is_rounded_to_what_fits(space_of: SpaceOf, sparsity: float, target: int) -> None:
    """At least the sparsity that was asked for is removed, never less."""
    assert Budget.from_sparsity(sparsity, space_of((1, tuple(range(20, -1, -1))))).first.target == target


COSTS = {  # of members of 10 and 7, steps of 10 and 14
    (0, 0): 68,
    (0, 1): 54,
    (1, 0): 58,
    (1, 1): 44,
    (2, 0): 48,
    (2, 1): 34,
}


def limit(target: int, *costs: tuple[int, ...], slack: int = 0) -> Limit:
    return Limit("parameters", target, sum(row[0] for row in costs), costs, slack=slack)


ROWS = ((40, 30, 20), (28, 14))


def test_met() -> None:
    budget = Budget((limit(47, *ROWS),))
    assert {allocation: budget.first.cost(allocation) for allocation in COSTS} == COSTS
    assert [allocation for allocation in COSTS if budget.met(allocation)] == [(1, 1)]
    assert [allocation for allocation in COSTS if budget.fits(allocation)] == [(1, 1), (2, 1)]


def test_what_is_not_known_better_may_be_left() -> None:
    budget = Budget((limit(47, *ROWS, slack=14),))
    assert [allocation for allocation in COSTS if budget.met(allocation)] == [(1, 1), (2, 1)]


def test_units_without_a_choice_leave_a_step_of_one_or_the_slack() -> None:
    assert limit(10, (10,), (5, 5)).smallest_step == 15  # any allocation is as near as can be
    assert limit(10, (10, 9, 9, 2)).smallest_step == 1
    assert limit(10, (10, 9), slack=4).smallest_step == 4


def test_of_several_limits_the_tightest_counts() -> None:
    budget = Budget((limit(47, *ROWS), Limit("flops", 40, 100, ((60, 40, 20), (40, 20)))))
    assert [allocation for allocation in COSTS if budget.fits(allocation)] == [(2, 1)]
    assert budget.met((2, 1))  # the FLOPs are spent to the last
    assert budget.left((2, 1)) == 0
    assert budget.left((1, 1)) == -1
    assert budget.first.kind == "parameters"
    assert budget.leading.kind == "flops"
    assert str(budget) == "47 of 68 prunable parameters to keep, 69.1%; 40 of 100 prunable flops to keep, 40.0%"


@given(targets=st.tuples(st.integers(34, 68), st.integers(40, 100)), beside=st.sampled_from(sorted(COSTS)))
def test_what_is_allowed_fits_all_limits(targets: tuple[int, int], beside: tuple[int, int]) -> None:
    budget = Budget((limit(targets[0], *ROWS), Limit("flops", targets[1], 100, ((60, 40, 20), (40, 20)))))
    for allocation in COSTS:
        if budget.allows(allocation, beside):
            assert all(one.cost(allocation) <= one.target for one in budget.limits)
        if budget.met(allocation):
            assert budget.allows(allocation, beside)


def test_latencies_of_the_whole_model_are_told_with_it() -> None:
    told = "4.500 of 9.000 ms of the whole model to keep (1.500 of 6.000 ms of all units, 25.0%)"
    assert str(Limit("latency", 1_500_000, 6_000_000, ((6_000_000, 0),), rest=3_000_000)) == told


def test_limits_of_the_whole_model_are_told_as_they_were_asked_for() -> None:
    told = "140 of 200 flops of the whole model to keep (40 of 100 of what can be pruned, 40.0%)"
    assert str(Limit("flops", 40, 100, ((60, 40, 20), (40, 20)), rest=100)) == told


def test_latencies_are_told_in_milliseconds() -> None:
    assert (
        str(Limit("latency", 1_500_000, 6_000_000, ((6_000_000, 0),)))
        == "1.500 of 6.000 ms of all units to keep, 25.0%"
    )


def test_a_budget_below_the_narrowest_width_is_refused_in_bits() -> None:
    expected = (
        r"budget\.bits=2 \(budget\.sparsity=0\.875\) cannot be met: "
        r".* take 2\.188 bits a weight, .*prune\.pruner\.bits$"
    )
    with pytest.raises(InputError, match=expected):
        Budget.from_sparsity(1 - 2 / DENSE_BITS, bits_space(6), "bits")
