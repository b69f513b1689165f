"""Scores of one unit at a time: which are measured, in what portions, and what the knapsack makes of them."""

import logging
from typing import Any

import numpy as np
import pytest

from search.budgets.knapsack import knapsack
from search.strategies.base import Problem
from search.strategies.dynamic_programming import DynamicProgramming
from supernet.errors import InputError
from supernet.space import Allocation
from tests.search.synthetic import TRANSFORMER, SpaceOf, last_step, make_problem, run, synthetic

GOOD: dict[str, Any] = {"generations": 4, "candidates": 25, "points": 8, "tokens": [32, 160]}


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    """Eight units of nine levels."""
    return make_problem(space_of(*TRANSFORMER), 0.4)


def scored(rows: Any) -> list[Allocation]:
    return [row.allocation for row in rows if row.step == 0 and not row.survived and row.tokens == 32]


@pytest.mark.parametrize("reference", ["dense", "start"])
def test_one_unit_at_a_time_differs_from_the_reference(problem: Problem, reference: str) -> None:
    states, rows = run(DynamicProgramming(**GOOD, reference=reference), problem)
    base, *others = scored(rows)
    assert base == ((0,) * 8 if reference == "dense" else problem.start)
    assert len(set(others)) == len(others) == 8 * 8
    assert all(np.count_nonzero(np.subtract(other, base)) == 1 for other in others)
    assert [sum(row.generation == g and row.step == 0 for row in rows) for g in range(3)] == [25, 25, 15]
    assert [row.allocation for row in last_step(rows, 0)] == [problem.start]
    assert states[-1].generation == 4


@pytest.mark.parametrize("reference", ["dense", "start"])
def test_all_levels_measured_give_the_optimum(problem: Problem, reference: str) -> None:
    states, _ = run(DynamicProgramming(**GOOD, reference=reference), problem)
    assert states[-1].parent == knapsack(synthetic(problem).losses, problem.budget)


def test_between_few_levels_it_interpolates(problem: Problem) -> None:
    states, rows = run(DynamicProgramming(**GOOD | {"points": 2}), problem)
    levels = {max(allocation) for allocation in scored(rows)}
    assert levels == {0, 4, 8}
    assert states[-1].generation == 2
    assert states[-1].exhausted  # there is nothing left to do
    assert synthetic(problem).exact(states[-1].parent) < synthetic(problem).exact(problem.start)


def test_what_does_not_fit_is_left_out(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, rows = run(DynamicProgramming(**GOOD | {"candidates": 12}), problem)  # three portions hold 36
    assert len(scored(rows)) == 1 + 8 * 4
    assert [record.message for record in caplog.records] == [
        "strategy.points: 4 levels of each unit are measured; raise strategy.generations for more"
    ]


def test_one_level_of_each_unit_is_measured_in_any_case(problem: Problem) -> None:
    states, rows = run(DynamicProgramming(**GOOD | {"candidates": 1}), problem)
    assert len(scored(rows)) == 1 + 8
    assert states[-1].generation == 4


def test_scores_never_fall_as_a_unit_gets_sparser(space_of: SpaceOf) -> None:
    """Noise would have it that pruning helps: then as many as possible would be pruned most."""
    problem = make_problem(space_of(*TRANSFORMER), 0.4, noise=0.5)
    strategy = DynamicProgramming(**GOOD)
    states, _ = run(strategy, problem)
    scores = states[-1].scores
    assert (np.diff(scores) < 0).any()
    losses = strategy._losses(problem, strategy._probes(problem, warn=False), scores)
    assert all((np.diff(loss) >= 0).all() for loss in losses)


def test_the_sequences_are_the_same_in_all_portions(space_of: SpaceOf) -> None:
    problem = make_problem(space_of(*TRANSFORMER), 0.4, shift=1.0)
    states, rows = run(DynamicProgramming(**GOOD), problem)
    shifts = [row.fitness - synthetic(problem).exact(row.allocation) for row in rows if row.generation < 3]
    assert shifts == pytest.approx([shifts[0]] * len(shifts))
    assert states[-1].parent == knapsack(synthetic(problem).losses, problem.budget)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generations": 1}, "strategy.generations=1 must be a whole number of at least 2"),
        ({"candidates": 0}, "strategy.candidates=0 must be a whole number of at least 1"),
        ({"points": 0}, "strategy.points=0 must be a whole number of at least 1"),
        (
            {"tokens": [512, 1024, 2048]},
            "must be a list of two whole numbers above 0, of a score and of the comparison",
        ),
        ({"reference": "uniform"}, "strategy.reference=uniform is not known; choose one of dense, start"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    DynamicProgramming(**GOOD)
    with pytest.raises(InputError, match=message):
        DynamicProgramming(**(GOOD | changed))
