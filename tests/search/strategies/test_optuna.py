"""Optuna's samplers: the curves that their numbers stand for, and what a search of them keeps to on losses that cost
nothing.
"""

import itertools
import json
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search.budgets.budget import Budget, Limit, costs_of
from search.budgets.knapsack import uniform
from search.strategies.base import Problem
from search.strategies.optuna_study import (
    SAMPLERS,
    SMALLEST,
    Curves,
    OptunaStudy,
    interpolation,
    kind_of,
    of_study,
    of_trial,
    shifted,
)
from supernet.errors import InputError
from supernet.space import Allocation, Level, Space, Unit
from tests.search.synthetic import (
    TRANSFORMER,
    SpaceOf,
    Synthetic,
    budget_of,
    make_problem,
    run,
    synthetic,
    through_json,
    without_seconds,
)

BLOCKS = TRANSFORMER * 2  # eight, of nine levels
EVALUATOR: dict[str, Any] = {"falling": True, "shift": 10.0}  # what depth tells is what curves can find


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    return make_problem(space_of(*BLOCKS), **EVALUATOR)


@pytest.fixture(params=SAMPLERS)
def strategy(request: pytest.FixtureRequest) -> OptunaStudy:
    return OptunaStudy(generations=6, offspring=6, tokens=60, sampler=request.param)


class TestSearch:
    @pytest.mark.parametrize("sparsity", [0.1, 0.437, 0.97])
    def test_the_budget_is_met_by_all_that_is_measured(
        self, strategy: OptunaStudy, space_of: SpaceOf, sparsity: float
    ) -> None:
        problem = make_problem(space_of(*BLOCKS), sparsity, **EVALUATOR)
        _, rows = run(strategy, problem)
        assert len({row.allocation for row in rows}) > 3
        assert all(problem.budget.met(row.allocation) for row in rows)

    def test_several_limits_are_all_kept(self, strategy: OptunaStudy, space_of: SpaceOf) -> None:
        space = space_of(*BLOCKS)
        costs = tuple(tuple((3, 1)[i % 2] * cost for cost in row) for i, row in enumerate(costs_of(space)))
        dense = sum(row[0] for row in costs)
        budget = Budget((*Budget.from_sparsity(0.3, space).limits, Limit("latency", int(0.65 * dense), dense, costs)))
        problem = Problem(space, budget, uniform(space, budget), Synthetic(space, **EVALUATOR))
        states, rows = run(strategy, problem)
        assert states[-1].parent != problem.start
        assert all(problem.allows(row.allocation) for row in rows)

    def test_it_gets_better(self, strategy: OptunaStudy, problem: Problem) -> None:
        states, _ = run(strategy, problem)
        losses = [synthetic(problem).exact(state.parent) for state in states]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.95 * losses[0]

    def test_it_learns_from_its_trials(self, strategy: OptunaStudy, problem: Problem) -> None:
        """What is proposed last is better than what is proposed first, by chance."""
        states, _ = run(OptunaStudy(12, 12, 16, strategy.sampler, knots=2), problem)
        values = [trial.value for trial in states[-1].trials[1:]]
        assert np.mean(values[-36:]) < np.mean(values[:12])
        assert min(values[-36:]) < min(values[:12])

    def test_a_seed_gives_the_same_run_and_another_one_another(self, strategy: OptunaStudy, problem: Problem) -> None:
        states, rows = run(strategy, problem, seed=1)
        again, rows_again = run(strategy, problem, seed=1)
        assert states[1:] == again[1:]
        assert without_seconds(rows) == without_seconds(rows_again)
        assert without_seconds(run(strategy, problem, seed=2)[1]) != without_seconds(rows)

    def test_advancing_leaves_state_and_generators_as_they_were(self, strategy: OptunaStudy, problem: Problem) -> None:
        np.random.seed(0)
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        state = run(strategy, problem)[0][2]
        content = json.dumps(state.to_json())
        assert strategy.advance(problem, state)[0] == strategy.advance(problem, state)[0]
        assert json.dumps(state.to_json()) == content
        assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]

    def test_optuna_is_silent_and_left_as_it_was(
        self, strategy: OptunaStudy, problem: Problem, capfd: pytest.CaptureFixture[str]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.INFO)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(strategy, problem)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        assert capfd.readouterr() == ("", "")

    def test_everything_is_measured_once_on_the_same_sequences(self, strategy: OptunaStudy, problem: Problem) -> None:
        states, rows = run(strategy, problem)
        calls = synthetic(problem).calls
        measured = [allocation for allocations, _ in calls for allocation in allocations]
        assert len(measured) == len(set(measured)) and set(measured) == {row.allocation for row in rows}
        assert {tuple(sequences) for _, sequences in calls} == {states[0].sequences}
        assert len(calls[0][1]) == 4  # of 16 tokens: 60 at least
        assert {row.tokens for row in rows} == {64}
        assert (
            states[-1].tokens
            == synthetic(problem).tokens
            <= strategy.tokens_per_generation * strategy.generations * 1.2
        )

    def test_the_parent_is_the_best_so_far(self, strategy: OptunaStudy, problem: Problem) -> None:
        states, rows = run(strategy, problem)
        for before, after in itertools.pairwise(states):
            step = [row for row in rows if row.generation == before.generation]
            assert step[0].allocation == before.parent
            (survivor,) = [row for row in step if row.survived]
            assert (survivor.allocation, survivor.fitness) == (after.parent, after.fitness)
            assert after.fitness == min(row.fitness for row in rows if row.generation <= before.generation)
            assert len({row.allocation for row in step}) == len(step) <= strategy.offspring + 1

    def test_all_trials_are_remembered(self, strategy: OptunaStudy, problem: Problem) -> None:
        states, rows = run(strategy, problem)
        fitness = {row.allocation: row.fitness for row in rows}
        trials = states[-1].trials
        curves = Curves.of(problem, strategy.knots)
        assert len(trials) >= 1 + strategy.generations * strategy.offspring
        for trial in trials:
            assert trial.value == fitness[trial.allocation]
            assert trial.allocation == curves.allocation(np.array(trial.params))

    @pytest.mark.parametrize(
        "units",
        [[(10, (4, 2)), (10, (4, 2)), (7, (6,))], [(10, (4, 2)), (7, (6,))], [(7, (6,))]],
        ids=["two kinds", "one kind", "no choice"],
    )
    @pytest.mark.parametrize("target", ["lowest", "dense"])
    def test_a_space_of_one_point_ends_at_once(
        self, strategy: OptunaStudy, space_of: SpaceOf, units: Any, target: str
    ) -> None:
        """Of the larger budget, every other allocation leaves more than a step."""
        space = space_of(*units)
        start = tuple(len(unit.levels) - 1 if target == "lowest" else 0 for unit in space.units)
        problem = Problem(space, budget_of(space, space.cost(start)), start, Synthetic(space))
        states, rows = run(strategy, problem)
        assert rows == [] and synthetic(problem).calls == []
        assert (states[-1].exhausted, states[-1].parent, states[-1].generation) == (True, start, 0)
        assert through_json(states[-1]).exhausted

    def test_a_small_space_is_searched_to_its_end(self, strategy: OptunaStudy, space_of: SpaceOf) -> None:
        space = space_of((10, (4, 2)), (1, (9,)), (10, (4, 2)))
        problem = Problem(space, budget_of(space, space.dense_cost - 20), (1, 0, 0), Synthetic(space, **EVALUATOR))
        states, rows = run(OptunaStudy(6, 6, 16, strategy.sampler, spread=1.0), problem)
        assert {row.allocation for row in rows} == {(1, 0, 0), (0, 0, 1)}
        assert states[-1].parent == (0, 0, 1)
        assert states[-1].exhausted

    def test_a_loss_that_is_not_a_number_is_the_worst(self, strategy: OptunaStudy, problem: Problem) -> None:
        class Broken(Synthetic):
            def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
                losses = super().__call__(allocations, chosen)
                losses[1::2] = np.nan
                return losses

        states, rows = run(
            strategy, Problem(problem.space, problem.budget, problem.start, Broken(problem.space, **EVALUATOR))
        )
        assert any(np.isnan(row.fitness) for row in rows)
        assert np.isfinite(states[-1].fitness)


class Payload:
    """What a pickle runs when it is read: it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


class TestHostileCheckpoint:
    """Whoever can write a checkpoint must not be able to run code: Optuna unpickles what CMA-ES keeps in a trial."""

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize(
        "key", ["cma:optimizer:0", "cma:optimizer", "sepcma:optimizer:0", "cma:n_dims:optimizer:0"]
    )
    def test_pickles_in_a_checkpoint_are_not_read(
        self, problem: Problem, tmp_path: Path, sampler: str, key: str
    ) -> None:
        strategy = OptunaStudy(3, 6, 60, sampler)
        states, _ = run(strategy, problem)
        marker = tmp_path / "code ran"
        pickled = pickle.dumps(Payload(marker)).hex()
        whole = states[2]
        trials = tuple(replace(trial, attrs=trial.attrs | {key: pickled}) for trial in whole.trials)
        hostile = replace(whole, trials=trials, study=whole.study | {key: pickled})
        after, _ = strategy.advance(problem, through_json(hostile))
        assert not marker.exists()
        assert [trial.value for trial in after.trials] == [trial.value for trial in states[3].trials]
        pickle.loads(bytes.fromhex(pickled))
        assert marker.exists()  # it would have

    def test_only_numbers_of_a_sampler_go_back_into_optuna(self) -> None:
        good = {"cma:generation": 3, "NSGAIISampler:generation": 0}
        bad = {
            "cma:generation:x": 1,
            "cma:optimizer:0": 1,
            "x:generation": "80",
            "y:generation": [1],
            "z:generation": True,
        }
        assert of_trial(good | bad) == good
        numbers = {"NSGAIISampler:parent:1": [1, 2], "nsga2:population": [1, [2, 3]]}
        assert (
            of_study(numbers | {"NSGAIISampler:parent:2": ["80"], "cma:optimizer:0": [1], "a:parent:1": {"b": 1}})
            == numbers
        )


class TestCurves:
    def test_no_change_is_the_start(self, problem: Problem) -> None:
        curves = Curves.of(problem, 4)
        assert len(curves.names) == 8
        assert curves.allocation(np.zeros(8)) == problem.start
        assert curves.allocation(np.full(8, 0.1)) == problem.start  # nor is what the budget takes back

    def test_what_a_curve_adds_is_added_within_rounding(self, problem: Problem) -> None:
        params = np.array([-0.3, -0.1, 0.1, 0.3, 0, 0, 0, 0])  # of attention, then of MLPs
        found = Curves.of(problem, 4).allocation(params)
        units = problem.space.units
        for kind, rises in {"attention": True, "mlp": False}.items():
            of_kind = [i for i, unit in enumerate(units) if unit.kind == kind]
            added = [units[i].sparsity(found[i]) - units[i].sparsity(problem.start[i]) for i in of_kind]
            wanted = interpolation(8, 4) @ params[:4] if rises else np.zeros(8)
            assert np.abs(np.cumsum(added - wanted)).max() < 0.13  # a level: errors do not add up

    def test_kinds(self, problem: Problem) -> None:
        """Those of linear layers are apart, those without a choice have no curve, and short ones have fewer knots."""
        levels = (Level(4, 4), Level(2, 2))
        names = {"weights": "layers.{}.attn.c_proj", "bits": "layers.{}.mlp.c_proj", "mlp": "layers.{}.mlp"}
        units = [Unit(name.format(i), kind, 4, levels) for i in range(5) for kind, name in names.items()]
        assert [kind_of(unit) for unit in units[:3]] == ["layers.attn.c_proj", "layers.mlp.c_proj", "mlp"]
        few = [Unit(f"layers.{i}.mixer", "mixer", 4, levels) for i in range(2)]
        none = [Unit(f"layers.{i}.heads", "heads", 4, levels[:1]) for i in range(5)]
        space = Space((*units, *few, *none))
        curves = Curves.of(make_problem(space, 0.25), 3)
        kinds = ["layers.attn.c_proj"] * 3 + ["layers.mlp.c_proj"] * 3 + ["mlp"] * 3 + ["mixer"] * 2
        assert [name.rsplit(" ", 1)[0] for name in curves.names] == kinds
        assert len(set(curves.names)) == len(kinds)
        assert curves.weights[:15].sum(1) == pytest.approx(np.ones(15)) and not curves.weights[17:].any()

    @pytest.mark.parametrize(("units", "knots"), [(1, 1), (9, 1), (2, 2), (9, 2), (9, 3), (9, 9), (32, 4)])
    def test_interpolation(self, units: int, knots: int) -> None:
        weights = interpolation(units, knots)
        assert weights.shape == (units, knots)
        assert weights.sum(1) == pytest.approx(np.ones(units)) and weights.min() >= 0
        assert weights[0, 0] == pytest.approx(1) and weights[-1, -1] == pytest.approx(1)
        if knots > 1 and (units - 1) % (knots - 1) == 0:  # units lie on the knots
            values = np.arange(knots) ** 2.0
            assert (weights @ values)[:: (units - 1) // (knots - 1)] == pytest.approx(values)

    def test_shifted(self) -> None:
        most, dense = np.array([1.0, 1.0, 0.5]), np.array([10.0, 20.0, 10.0])
        found = shifted(np.array([-0.2, 0.4, 0.9]), most, dense, cost=20.0)
        assert found == pytest.approx([0.1, 0.7, 0.5])
        assert shifted(found, most, dense, cost=20.0) == pytest.approx(found)

    @settings(deadline=None, max_examples=100)
    @given(seed=st.integers(0, 10_000), units=st.integers(1, 6), sparsity=st.floats(0.01, 0.95), second=st.booleans())
    def test_every_curve_gives_an_allocation_that_is_allowed(
        self, random_space: SpaceOf, seed: int, units: int, sparsity: float, second: bool
    ) -> None:
        space = random_space(seed, units, levels=5)
        assume(space.dense_cost * (1 - sparsity) >= space.lowest_cost + 1)
        rng = np.random.default_rng(seed)
        budget = Budget.from_sparsity(sparsity, space)
        if second:
            costs = tuple(
                tuple(int(rate) * cost for cost in row)
                for rate, row in zip(rng.integers(0, 4, units), costs_of(space), strict=True)
            )
            dense = sum(row[0] for row in costs)
            assume(dense > 0)
            lowest = sum(row[-1] for row in costs)
            budget = Budget((*budget.limits, Limit("latency", int(rng.integers(lowest, dense + 1)), dense, costs)))
        start = uniform(space, budget)
        assume(budget.fits(start))
        problem = Problem(space, budget, start, Synthetic(space))
        curves = Curves.of(problem, 3)
        for _ in range(5):
            found = curves.allocation(rng.uniform(-0.5, 0.5, len(curves.names)))
            assert all(0 <= level < len(unit.levels) for unit, level in zip(space.units, found, strict=True))
            assert problem.allows(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generations": -1}, "strategy.generations=-1 must be a whole number of at least 0"),
        ({"generations": 1.5}, "strategy.generations=1.5 must be a whole number"),
        ({"offspring": 0}, "strategy.offspring=0 must be a whole number of at least 1"),
        ({"offspring": 1, "sampler": "nsga2"}, "strategy.offspring=1 must be a whole number of at least 2"),
        ({"offspring": 3, "sampler": "cmaes"}, "strategy.offspring=3 must be a whole number of at least 4"),
        ({"tokens": 0}, "strategy.tokens=0 must be a whole number of at least 1"),
        ({"tokens": [512]}, r"strategy.tokens=\[512\] must be a whole number"),
        ({"knots": 0}, "strategy.knots=0 must be"),
        ({"knots": True}, "strategy.knots=True must be"),
        ({"spread": 0}, "strategy.spread=0 must be a number above 0"),
        ({"spread": 1.5}, "strategy.spread=1.5 must be"),
        ({"spread": "wide"}, "strategy.spread=wide must be"),
        ({"sampler": "cma"}, "strategy.sampler=cma must be one of tpe, cmaes, nsga2"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"generations": 0, "offspring": 2, "tokens": 1, "sampler": "tpe", "knots": 1, "spread": 1}
    assert OptunaStudy(**good).tokens_per_generation == 2
    with pytest.raises(InputError, match=message):
        OptunaStudy(**(good | changed))


@pytest.mark.parametrize(("sampler", "offspring"), SMALLEST.items())
def test_the_smallest_populations_work(problem: Problem, sampler: str, offspring: int) -> None:
    states, _ = run(OptunaStudy(4, offspring, 16, sampler, knots=1), problem)
    assert states[-1].generation == 4 or states[-1].exhausted
