"""The steepest exchange: what it measures, and what it makes of it."""

from typing import Any

import numpy as np
import pytest

from search.budgets.knapsack import knapsack
from search.strategies.base import Problem
from search.strategies.greedy import Greedy, best_exchanges, completed
from supernet.errors import InputError
from tests.search.synthetic import TRANSFORMER, SpaceOf, Synthetic, budget_of, last_step, make_problem, run, synthetic

GOOD: dict[str, Any] = {"generations": 1, "candidates": 64, "exchanges": 2, "tokens": [32, 160]}


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    """Eight units of nine levels."""
    return make_problem(space_of(*TRANSFORMER), 0.5)


def test_every_unit_goes_a_level_up_and_down(problem: Problem) -> None:
    states, rows = run(Greedy(**GOOD), problem)
    first = [row for row in rows if row.step == 0]
    assert first[0].allocation == problem.start
    changes = [tuple(np.subtract(row.allocation, problem.start)) for row in first[1:]]
    assert len(set(changes)) == len(changes) == 16
    assert all(sorted(map(abs, change)) == [0] * 7 + [1] for change in changes)
    final = last_step(rows, 0)
    assert [row.allocation == problem.start for row in final] == [True, False, False]  # one exchange, and two together
    assert states[-1].tokens <= 17 * 32 + 3 * 160


def test_of_many_units_as_many_go_up_as_down(problem: Problem) -> None:
    greedy = Greedy(**GOOD | {"candidates": 6})
    chosen = set()
    for seed in range(5):
        _, rows = run(greedy, problem, seed)
        changes = [np.subtract(row.allocation, problem.start).sum() for row in rows if row.step == 0]
        assert changes == [0, -1, -1, -1, 1, 1, 1]
        chosen |= {row.allocation for row in rows if row.step == 0}
    assert len(chosen) > 10
    assert greedy.tokens_per_generation == 7 * 32 + 3 * 160


def test_it_is_steep(space_of: SpaceOf) -> None:
    """Without noise, a few generations lead near to the optimum."""
    problem = make_problem(space_of(*TRANSFORMER * 2), 0.4, seed=5)
    best, start = (
        synthetic(problem).exact(a) for a in (knapsack(synthetic(problem).losses, problem.budget), problem.start)
    )
    states, _ = run(Greedy(**GOOD | {"generations": 15, "exchanges": 4}), problem)
    assert synthetic(problem).exact(states[-1].parent) - best < 0.05 * (start - best)


def test_where_nothing_promises_a_gain_only_the_parent_is_compared(problem: Problem) -> None:
    best = knapsack(synthetic(problem).losses, problem.budget)
    at_best = Problem(problem.space, problem.budget, best, problem.evaluate)
    states, rows = run(Greedy(**GOOD), at_best)
    assert states[-1].parent == best
    assert not states[-1].exhausted
    assert [row.allocation for row in last_step(rows, 0)] == [best]
    assert states[-1].tokens == len({row.allocation for row in rows}) * 32  # it is not even measured again


def test_an_exchange_takes_the_best_prices(space_of: SpaceOf) -> None:
    space = space_of((30, (2, 1, 0)), *[(10, (2, 1, 0))] * 5)
    problem = Problem(space, budget_of(space, 30 + 50), (1,) * 6, Synthetic(space))
    effects = {(0, -1): -1.0, (1, 1): 0.5, (2, 1): 0.1, (3, 1): 0.3, (4, 1): 0.2, (5, -1): -0.4}
    change, child = completed(problem, problem.start, (0, -1), effects) or (0.0, ())
    assert change == pytest.approx(-1.0 + 0.1 + 0.2 + 0.3)
    assert child == (0, 1, 2, 2, 2, 1)
    # the level that it frees goes to the unit that gains most
    freed = completed(problem, problem.start, (2, 1), effects)
    assert freed == (pytest.approx(0.1 - 0.4), (1, 1, 2, 1, 1, 0))
    assert completed(problem, problem.start, (0, -1), {(0, -1): -1.0, (1, 1): 0.5}) is None  # one payer has not enough


def test_exchanges_add_up_on_units_of_their_own(space_of: SpaceOf) -> None:
    space = space_of(*[(10, (2, 1, 0))] * 6)
    problem = Problem(space, budget_of(space, 60), (1,) * 6, Synthetic(space))
    effects = {(0, -1): -1.0, (1, -1): -0.9, (2, -1): -0.1, (3, 1): 0.2, (4, 1): 0.3, (5, 1): 0.4}
    assert list(best_exchanges(problem, problem.start, effects, 5)) == [
        (0, 1, 1, 2, 1, 1),
        (0, 0, 1, 2, 2, 1),
    ]  # a third would lose


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generations": -1}, "strategy.generations=-1 must be a whole number of at least 0"),
        ({"candidates": 1}, "strategy.candidates=1 must be a whole number of at least 2"),
        ({"exchanges": 0}, "strategy.exchanges=0 must be a whole number of at least 1"),
        ({"exchanges": 1.5}, "strategy.exchanges=1.5 must be a whole number"),
        (
            {"tokens": 512},
            r"strategy.tokens=512 must be a list of two whole numbers above 0, of a single move and of the",
        ),
        ({"tokens": [512]}, "must be a list of two whole numbers"),
        ({"tokens": [0, 512]}, "above 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    Greedy(**GOOD)
    with pytest.raises(InputError, match=message):
        Greedy(**(GOOD | changed))
