"""The front of one run: within all budgets, resumable, better than uniform everywhere; and budgets taken from it
afterwards.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from search.budgets.budget import Budget, Limit
from search.budgets.knapsack import knapsack, uniform
from search.paths import CACHE_VARIABLE
from search.run.directory import RunDirectory
from search.strategies.base import Problem
from search.strategies.guided.pareto import Pareto, budgets_of
from search.strategies.rules.front import Front, front_json, read_front
from search.strategies.state import State
from supernet.errors import InputError
from supernet.space import Allocation, Space
from supernet.system.records import write_record
from tests.search.synthetic import (
    TRANSFORMER,
    SpaceOf,
    Synthetic,
    as_json,
    budget_of,
    make_problem,
    run,
    synthetic,
    through_json,
    without_seconds,
)

Call = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]

POINTS = 4
SETTINGS: dict[str, Any] = {"points": POINTS, "generations": 8, "offspring": 6, "tokens": 64, "growth": 8}
STRATEGIES = {
    "gradient": Pareto(**SETTINGS, proposal_tokens=32),
    "forward": Pareto(**SETTINGS, proposal="forward", proposal_tokens=64),
    "fewer generations than points": Pareto(**SETTINGS | {"generations": 3}, proposal_tokens=32),
    "one point": Pareto(**SETTINGS | {"points": 1, "generations": 3}, proposal_tokens=32),
}


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    return make_problem(space_of(*TRANSFORMER), 0.6, noise=0.05)


def two_limits(space: Space, sparsity: float = 0.6) -> Problem:
    """The second limit counts attention dearer."""
    costs = tuple(tuple(level.cost * (3, 1)[i % 2] for level in unit.levels) for i, unit in enumerate(space.units))
    dense = sum(row[0] for row in costs)
    second = Limit("latency", int((0.96 - sparsity) * dense), dense, costs)
    budget = Budget((*Budget.from_sparsity(sparsity, space).limits, second))
    return Problem(space, budget, uniform(space, budget), Synthetic(space, noise=0.05))


def allocations(state: State) -> list[Allocation]:
    return [point.allocation for point in state.searches]


# Pareto


def test_budgets_lie_evenly_between_the_run_s_and_the_dense_model(space_of: SpaceOf) -> None:
    budget = two_limits(space_of(*TRANSFORMER)).budget
    found = budgets_of(budget, 4)
    assert found[0] == budget
    for n, limit in enumerate(budget.limits):
        shares = [1.0 - one.limits[n].target / limit.dense for one in found]
        assert shares == pytest.approx([shares[0] * f for f in (1.0, 0.75, 0.5, 0.25)], abs=1e-3)


@pytest.mark.parametrize("limits", [1, 2])
def test_all_points_keep_their_budgets(strategy: Pareto, problem: Problem, limits: int) -> None:
    problem = problem if limits == 1 else two_limits(problem.space)
    budgets = budgets_of(problem.budget, strategy.points)
    states, _ = run(strategy, problem)
    assert len(states) == 1 + strategy.generations
    for state in states[:-1]:
        starts = [point.start for point in state.searches]
        assert all(
            budget.allows(a, start) for budget, a, start in zip(budgets, allocations(state), starts, strict=True)
        )
    assert all(budget.fits(a) for budget, a in zip(budgets, allocations(states[-1]), strict=True))
    assert all(state.parent == allocations(state)[0] for state in states)
    assert states[-1].parent != problem.start


@pytest.mark.parametrize("seed", range(3))
def test_odd_spaces_are_no_exception(strategy: Pareto, random_space: SpaceOf, seed: int) -> None:
    problem = make_problem(random_space(seed, units=6, levels=5), 0.3)
    budgets = budgets_of(problem.budget, strategy.points)
    for state in run(strategy, problem)[0]:
        assert all(budget.fits(a) for budget, a in zip(budgets, allocations(state), strict=True))


def test_a_seed_gives_the_same_run_and_another_one_another(strategy: Pareto, problem: Problem) -> None:
    states, rows = run(strategy, problem, seed=1)
    again, rows_again = run(strategy, problem, seed=1)
    assert as_json(states) == as_json(again)
    assert without_seconds(rows) == without_seconds(rows_again)
    assert without_seconds(run(strategy, problem, seed=2)[1]) != without_seconds(rows)


def test_advancing_leaves_the_state_as_it_was(strategy: Pareto, problem: Problem) -> None:
    state = strategy.advance(problem, strategy.begin(problem, 0))[0]
    before = as_json([state])
    strategy.advance(problem, state)
    assert as_json([state]) == before


def test_no_more_tokens_than_told(strategy: Pareto, problem: Problem) -> None:
    states, rows = run(strategy, problem)
    told = strategy.tokens_per_generation * strategy.generations
    assert 0.1 * told < states[-1].tokens <= told
    seen = [(row.generation, row.step, row.allocation) for row in rows]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("name", ["gradient", "forward"])
def test_the_front_beats_uniform_at_every_point(problem: Problem, name: str, limits: int) -> None:
    problem = problem if limits == 1 else two_limits(problem.space)
    state = run(STRATEGIES[name], problem)[0][-1]
    exact = synthetic(problem).exact
    for budget, allocation in zip(budgets_of(problem.budget, POINTS), allocations(state), strict=True):
        even, best = exact(uniform(problem.space, budget)), exact(knapsack(synthetic(problem).losses, budget))
        assert exact(allocation) < even - 0.5 * (even - best)


def test_losses_are_measured_on_the_same_tokens_and_fall_with_cost(strategy: Pareto, space_of: SpaceOf) -> None:
    problem = make_problem(space_of(*TRANSFORMER), 0.6, shift=1.0)
    front = run(strategy, problem)[0][-1].searches
    assert {point.tokens for point in front} == {min(64 * 8, 40 * 16)}
    shifts = [point.fitness - synthetic(problem).exact(point.allocation) for point in front]
    assert shifts == pytest.approx([shifts[0]] * len(shifts))
    losses = [point.fitness for point in front]
    assert losses == sorted(losses, reverse=True)


def test_a_point_that_a_cheaper_one_beats_takes_its_allocation(space_of: SpaceOf) -> None:
    """Noise that a single allocation escapes: nothing denser is as good."""
    problem = make_problem(space_of(*TRANSFORMER), 0.6)

    class Worse(Synthetic):
        def __call__(self, allocations: Any, chosen: np.ndarray) -> np.ndarray:
            good = np.array([[0.0 if a == problem.start else 10.0] for a in allocations])
            return super().__call__(allocations, chosen) + good

    state = run(STRATEGIES["gradient"], replace(problem, evaluate=Worse(problem.space)))[0][-1]
    assert allocations(state) == [problem.start] * POINTS
    assert len({point.fitness for point in state.searches}) == 1


def test_without_a_choice_anywhere_it_ends(space_of: SpaceOf) -> None:
    space = space_of((10, (4, 2)))
    problem = Problem(space, budget_of(space, space.lowest_cost), (1,), Synthetic(space))
    states, _ = run(replace(STRATEGIES["gradient"], points=1), problem)
    assert states[-1].exhausted and len(states) == 2
    assert states[-1].parent == (1,)
    assert states[-1].tokens == synthetic(problem).tokens
    assert states[-1].searches[0].fitness == pytest.approx(synthetic(problem).exact((1,)))
    assert through_json(states[-1]).exhausted


@pytest.mark.parametrize("points", [0, 2.5, "many"])
def test_points_must_be_a_number(points: Any) -> None:
    with pytest.raises(InputError, match=f"strategy.points={points} must be a whole number of at least 1"):
        Pareto(points=points)


# Front


@pytest.fixture
def file(problem: Problem, tmp_path: Path) -> Path:
    """A front at sparsities of 0.6, 0.45, 0.3 and 0.15."""
    state = run(STRATEGIES["gradient"], problem)[0][-1]
    path = tmp_path / "front.json"
    write_record(
        path,
        front_json(problem.space, STRATEGIES["gradient"].front(state) or [], problem.budget, {"name": "synthetic"}),
    )
    return path


def taken(file: Path, problem: Problem) -> Allocation:
    rule = Front(str(file), tokens=64)
    before = synthetic(problem).tokens
    state, rows = rule.advance(problem, rule.begin(problem, 0))
    assert state.tokens == synthetic(problem).tokens - before <= rule.tokens_per_generation
    assert [row.allocation for row in rows if row.survived] == ([state.parent] if rows else [])
    assert (state.generation, state.fitness is None) == (1, not rows)
    return state.parent


def test_the_file(file: Path, problem: Problem) -> None:
    content = json.loads(file.read_text())
    assert (content["format"], content["kind"], content["space"]) == (2, "parameters", problem.space.fingerprint)
    points = content["points"]
    assert [point["target"] for point in points[:-1]] == [b.first.target for b in budgets_of(problem.budget, POINTS)]
    assert all(0 < point["achieved"] <= point["target"] for point in points)
    assert points[-1]["kept"] == {unit.name: unit.total for unit in problem.space.units}
    assert (points[-1]["fitness"], points[-1]["achieved"]) == (0.0, problem.space.dense_cost)
    assert read_front(str(file)) == [point["kept"] for point in points]


def test_a_point_s_own_budget_gives_its_allocation(file: Path, problem: Problem) -> None:
    before = synthetic(problem).tokens
    for index, budget in enumerate(budgets_of(problem.budget, POINTS)):
        found = taken(file, replace(problem, budget=budget, start=uniform(problem.space, budget)))
        assert problem.space.kept(found) == read_front(str(file))[index]
    assert synthetic(problem).tokens == before  # the front's own run has measured them


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_what_a_budget_allows_is_taken(file: Path, problem: Problem, seed: int) -> None:
    # others' losses
    asked = replace(make_problem(problem.space, 0.37), evaluate=Synthetic(problem.space, seed=seed + 10))
    rule = Front(str(file), tokens=64)
    found, rows = rule.advance(asked, rule.begin(asked, 0))
    assert len(rows) > 2 and asked.start in {row.allocation for row in rows}
    assert synthetic(asked).exact(found.parent) == min(synthetic(asked).exact(row.allocation) for row in rows)
    asked = replace(asked, evaluate=Synthetic(problem.space, seed=seed + 10))
    state, rows = Front(str(file), tokens=0).advance(asked, rule.begin(asked, 0))
    assert (rows, state.tokens, synthetic(asked).calls) == ([], 0, [])


@pytest.mark.parametrize("sparsity", [0.59, 0.5, 0.4, 0.23, 0.1, 0.02])
def test_a_budget_in_between(file: Path, problem: Problem, sparsity: float) -> None:
    asked = make_problem(problem.space, sparsity)
    found = taken(file, asked)
    assert asked.budget.met(found)
    exact = synthetic(problem).exact
    assert exact(found) < exact(asked.start)
    points = [exact(problem.space.nearest(dict(point))) for point in read_front(str(file))]
    assert min(points) <= exact(found) <= 1.02 * max(points)


def test_several_limits_and_other_kinds_of_budget(file: Path, problem: Problem) -> None:
    asked = two_limits(problem.space, 0.45)
    assert asked.allows(taken(file, asked))
    flops = Budget((replace(asked.budget.limits[1], target=asked.budget.limits[1].dense * 7 // 10),))
    start = uniform(problem.space, flops)
    assert flops.allows(taken(file, replace(asked, budget=flops, start=start)), start)


def test_what_no_point_has_is_measured(file: Path, space_of: SpaceOf) -> None:
    """A point rounded to other levels is no point of the front."""
    asked = make_problem(space_of(*[(1000, (8, 4, 2, 0)), (30, (256, 128, 64, 0))] * 4), 0.44)
    rule = Front(str(file), tokens=64)
    state, rows = rule.advance(asked, rule.begin(asked, 0))
    assert asked.space.kept(state.parent) not in rule.points and rows


def test_other_levels_of_the_same_units(file: Path, space_of: SpaceOf, problem: Problem) -> None:
    """A coarser grid, and windows that do not reach down to the sparsest point."""
    coarse = space_of(*[(1000, (8, 6, 4, 2)), (30, (256, 192, 128, 100))] * 4)
    asked = make_problem(coarse, 0.45)
    assert asked.allows(taken(file, asked))


def refusal_of(file: Path, problem: Problem) -> str:
    with pytest.raises(InputError) as error:
        taken(file, problem)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_told(file: Path, problem: Problem, space_of: SpaceOf) -> None:
    assert "sparser than the sparsest point" in refusal_of(file, make_problem(problem.space, 0.7))
    assert "other units: unit.8: no such unit there" in refusal_of(
        file, make_problem(space_of(*TRANSFORMER, (1, (4, 0))), 0.5)
    )
    assert "unit.0: 8 members there, 7 members here; give one of the same model" in refusal_of(
        file, make_problem(space_of((1000, (7, 3)), *TRANSFORMER[1:]), 0.3)
    )
    assert "is not there" in refusal_of(file.with_name("none.json"), problem)
    content = json.loads(file.read_text())
    del content["checksum"]
    short = content | {"points": [content["points"][0] | {"kept": {"unit.0": 3}}, content["points"][-1]]}
    for broken, part in (
        ('{"format": 2', "damaged"),
        ("[]", "damaged"),
        ("{}", "there is no 'format'"),
        (json.dumps(content | {"format": 1}), "format 1; this version reads format 2"),
        (json.dumps(content), "it has no checksum"),
        (json.dumps(content | {"checksum": "0" * 32}), "its checksum does not match"),
        ("[" * 100_000, "it is no JSON"),
        (content | {"points": []}, "damaged"),
        (content | {"points": [{"kept": 3}]}, "damaged"),
        (short, "not of the same units"),
    ):
        if isinstance(broken, str):
            file.write_text(broken)
        else:
            write_record(file, broken)
        assert part in refusal_of(file, problem)


# Through the pipeline

SMOKE = ("+experiment=smoke", "rounds=1", "stages=[build,search]")
SMALL = ("strategy.points=3", "strategy.generations=6", "strategy.offspring=3", "strategy.tokens=128")


def test_a_budget_from_the_front_of_a_run(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal, run_search: Call
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pareto = (*SMOKE, "strategy=pareto", *SMALL, "budget.sparsity=0.6", "hydra.run.dir=front")
    assert "rounds=2" in refusal(call(*pareto, "rounds=2"))
    process = run_search(tmp_path, *pareto)
    assert (process.returncode, process.stderr) == (0, "")
    file = tmp_path / "front/front.json"
    content, whole = json.loads(file.read_text()), json.loads((tmp_path / "front/allocation.json").read_text())
    assert (content["model"], content["space"]) == (whole["model"], whole["space"])
    assert content["points"][0]["kept"] == {unit["name"]: unit["kept"] for unit in whole["units"]}
    assert [point["target"] / whole["budget"]["dense"] for point in content["points"]] == pytest.approx(
        [0.4, 0.6, 0.8, 1.0]
    )
    losses = [point["fitness"] for point in content["points"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0

    rule = (*SMOKE, "strategy=front", f"strategy.file={file}")
    assert call(*rule, "budget.sparsity=0.5", "hydra.run.dir=half").returncode == 0
    half = json.loads((tmp_path / "half/allocation.json").read_text())["budget"]
    assert 0.45 * half["dense"] < half["achieved"] <= half["target"] == 0.5 * half["dense"]
    assert not (tmp_path / "half/front.json").exists()
    twice = call(*rule, "rounds=2", "budget.sparsity=null", "budget.bytes=750kB", "hydra.run.dir=bytes")
    assert (
        twice.returncode == 0 and "rounds=2 with strategy=front" in twice.stdout and "rounds=1 will do" in twice.stdout
    )
    assert "sparser than the sparsest point" in refusal(call(*rule, "budget.sparsity=0.7", "dry_run=true"))
    assert "sparser than the sparsest point" in refusal(call(*rule, "budget.sparsity=0.7", "hydra.run.dir=none"))
    assert "other units" in refusal(call(*rule, "prune=wanda", "hydra.run.dir=other"))
    assert "strategy.file is not given" in refusal(call(*SMOKE, "strategy=front", "hydra.run.dir=none"))
    assert not (tmp_path / "none/checkpoint").exists()

    before = file.read_bytes()
    assert call(*pareto).returncode == 0  # goes on where it was: at the end
    assert file.read_bytes() == before
    RunDirectory(file.parent, {}, fresh=True, results=["front.json"])
    assert (tmp_path / "front.old-1/front.json").read_bytes() == before and not file.exists()
