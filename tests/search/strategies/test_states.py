"""What every strategy remembers: JSON and back without a difference, and a run that goes on from any generation."""

import json
from typing import Any

import pytest

from search.strategies.base import Problem, Strategy
from search.strategies.optuna_study import OptunaStudy
from search.strategies.rules.bonsai import Bonsai
from search.strategies.rules.uniform import Uniform
from supernet.system.records import WRONG
from tests.search.strategies.test_strategies import STRATEGIES
from tests.search.synthetic import TRANSFORMER, SpaceOf, make_problem, run, synthetic, through_json, without_seconds

REMEMBER: dict[str, Strategy] = STRATEGIES | {
    "tpe": OptunaStudy(3, 6, 60, "tpe"),
    "cmaes": OptunaStudy(3, 6, 60, "cmaes"),
    "nsga2": OptunaStudy(3, 6, 60, "nsga2"),
    "bonsai": Bonsai(samples=50, tokens=30),
    "uniform": Uniform(),
}


@pytest.fixture(params=REMEMBER.values(), ids=REMEMBER)
def strategy(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    return make_problem(space_of(*TRANSFORMER), noise=0.05)


def test_a_state_is_what_its_strategy_says_and_is_equal_behind_json(strategy: Strategy, problem: Problem) -> None:
    for state in run(strategy, problem)[0]:
        assert type(state) is strategy.state_class
        assert through_json(state) == state
        state.check_levels(problem.space)


def test_a_run_that_is_killed_in_every_generation_ends_as_one_that_is_not(strategy: Strategy, problem: Problem) -> None:
    states, rows = run(strategy, problem)
    tokens = synthetic(problem).tokens
    resumed, rows_resumed = run(strategy, problem, pause=through_json)
    assert resumed == states
    assert without_seconds(rows_resumed) == without_seconds(rows)
    assert synthetic(problem).tokens == 2 * tokens  # nothing was measured again


def test_every_value_that_is_missing_or_of_another_kind_is_refused(strategy: Strategy, problem: Problem) -> None:
    """A checkpoint could be made by hand: no field may come into a search unseen."""
    content = json.loads(json.dumps(run(strategy, problem)[0][-1].to_json()))
    for name in content:
        for wrong in ({key: value for key, value in content.items() if key != name}, content | {name: "?"}):
            with pytest.raises(WRONG):
                strategy.state_class.from_json(wrong)
    with pytest.raises(ValueError, match="is not what this strategy remembers"):
        strategy.state_class.from_json(content | {"memory": {}})


def allocations_in(content: Any, units: int) -> list[list[int]]:
    """Every list in a state's JSON that could be an allocation."""
    if isinstance(content, dict):
        return [found for value in content.values() for found in allocations_in(value, units)]
    if not isinstance(content, list):
        return []
    if len(content) == units and all(type(level) is int for level in content):
        return [content]
    return [found for value in content for found in allocations_in(value, units)]


def test_allocations_of_other_levels_are_refused_wherever_they_are(strategy: Strategy, problem: Problem) -> None:
    content = json.loads(json.dumps(run(strategy, problem)[0][1].to_json()))
    found = allocations_in(content, len(problem.space.units))
    assert found
    for allocation in found:
        before, allocation[0] = allocation[0], 99
        with pytest.raises(ValueError, match="levels that there are not"):
            strategy.state_class.from_json(content).check_levels(problem.space)
        allocation[0] = before
