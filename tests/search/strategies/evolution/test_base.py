"""EvoPress, Týr's search and random search: what they propose, and what their selection steps measure."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search.budgets.budget import Budget
from search.budgets.knapsack import closest, knapsack
from search.strategies.base import Problem
from search.strategies.evolution.base import Evolution, exchange, few
from search.strategies.evolution.evopress import EvoPress
from search.strategies.evolution.random import Random
from search.strategies.evolution.tyr import Tyr, keeps_shares
from search.strategies.measuring import sequences_for
from supernet.errors import InputError
from supernet.space import Allocation
from tests.search.synthetic import TRANSFORMER, SpaceOf, Synthetic, budget_of, last_step, make_problem, run, synthetic

STEPS: dict[str, Any] = {"generations": 5, "offspring": 8, "tokens": [32, 64, 160], "survivors": [4, 2, 1]}


@pytest.fixture
def problem(space_of: SpaceOf) -> Problem:
    """Eight units of nine levels, whose loss is noisy."""
    return make_problem(space_of(*TRANSFORMER), noise=0.05)


def children(problem: Problem, tries: int, **options: Any) -> set[Allocation | None]:
    return {exchange(problem, problem.start, 1, np.random.default_rng(seed), **options) for seed in range(tries)}


class TestSelection:
    @pytest.mark.parametrize("kind", [EvoPress, Tyr, Random])
    def test_all_that_is_measured_meets_the_budget(self, problem: Problem, kind: type[Evolution]) -> None:
        _, rows = run(kind(**STEPS), problem)
        assert all(problem.budget.met(row.allocation) for row in rows)

    def test_steps_measure_what_they_should(self, problem: Problem) -> None:
        evolution = EvoPress(**STEPS | {"generations": 1})
        states, rows = run(evolution, problem)
        assert [row.step for row in rows] == [0] * 8 + [1] * 4 + [2] * 3
        assert [row.tokens for row in rows] == [32] * 8 + [64] * 4 + [160] * 3
        assert [row.survived for row in rows].count(True) == 4 + 2 + 1
        assert evolution.tokens_per_generation == 8 * 32 + 4 * 64 + 3 * 160
        again = evolution.tokens_per_generation - states[-1].tokens  # on sequences that an earlier step had drawn, too
        assert 0 <= again < 4 * 64
        assert problem.start not in [row.allocation for row in rows[:-3]]  # the parent comes in for the last step
        assert rows[-3].allocation == problem.start

    def test_every_step_draws_sequences_of_its_own(self, problem: Problem) -> None:
        """As published; a sequence that comes again is not measured again."""
        seen: Counter[tuple[int, ...]] = Counter()
        for seed in range(10):
            run(EvoPress(**STEPS | {"generations": 1}), problem, seed)
        for allocations, chosen in synthetic(problem).calls:
            if len(allocations) == 8:  # the first step
                seen[tuple(sorted(chosen))] += 1
        assert len(seen) > 7
        first, second = (set(chosen) for _, chosen in synthetic(problem).calls[:2])
        assert not first & second

    def test_few_allocations_are_all_proposed(self, space_of: SpaceOf) -> None:
        space = space_of(*[(10, (2, 1))] * 4)
        problem = make_problem(space, 0.25)  # two of four units lose a member: six allocations
        _, rows = run(EvoPress(generations=1, offspring=50, tokens=[16], survivors=[1], max_exchanges=3), problem)
        assert len({row.allocation for row in rows}) == 6
        assert rows[0].allocation == problem.start  # measured, too, on the same tokens

    def test_it_comes_near_to_the_optimum_of_a_large_space(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*TRANSFORMER * 4), 0.4, seed=5)
        best, start = (
            synthetic(problem).exact(a) for a in (knapsack(synthetic(problem).losses, problem.budget), problem.start)
        )
        states, _ = run(EvoPress(generations=100, offspring=16, tokens=[16, 64], survivors=[4, 1]), problem)
        found = synthetic(problem).exact(states[-1].parent)
        assert best <= found + 1e-12
        assert found - best < 0.1 * (start - best)

    @pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (16, 1), (17, 2), (640, 40), (10_000, 40)])
    def test_enough_sequences_or_the_whole_pool(self, problem: Problem, tokens: int, sequences: int) -> None:
        assert sequences_for(tokens, problem) == sequences

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"generations": -1}, "strategy.generations=-1 must be a whole number of at least 0"),
            ({"generations": 1.5}, "strategy.generations=1.5 must be a whole number"),
            ({"offspring": 0}, "strategy.offspring=0 must be a whole number of at least 1"),
            ({"survivors": []}, "must have one number for each of strategy.tokens"),
            ({"survivors": [4, 2, 1]}, "must have one number for each"),
            ({"survivors": [4, 2]}, "end in 1; for example"),
            ({"survivors": [0, 1]}, "must have one number for each"),
            ({"tokens": [16, 32, 64], "survivors": [2, 4, 1]}, "must not rise"),
            ({"tokens": [0, 16]}, "must be above 0"),
            ({"tokens": [32, 16]}, "not fall"),
            ({"tokens": "512"}, "strategy.tokens=512 must be a list of whole numbers"),
            ({"tokens": [16.0, 32]}, "must be a list of whole numbers"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", [EvoPress, Tyr, Random])
    def test_bad_settings_are_refused(self, kind: type[Evolution], changed: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {"generations": 1, "offspring": 4, "tokens": [16, 32], "survivors": [2, 1]}
        kind(**good)
        with pytest.raises(InputError, match=message):
            kind(**(good | changed))

    @pytest.mark.parametrize(
        ("kind", "changed", "message"),
        [
            (EvoPress, {"max_exchanges": 0}, "strategy.max_exchanges=0 must be a whole number of at least 1"),
            (Tyr, {"max_exchanges": "few"}, "strategy.max_exchanges=few must be a whole number"),
            (Random, {"spread": 0.0}, "strategy.spread=0.0 must be a number above 0 and at most 1"),
            (Random, {"spread": 1.5}, "strategy.spread=1.5 must be a number above 0 and at most 1"),
            (Random, {"spread": True}, "strategy.spread=True must be a number"),
            (Random, {"spread": "wide"}, "strategy.spread=wide must be a number"),
        ],
        ids=str,
    )
    def test_bad_settings_of_its_own_are_refused(
        self, kind: type[Evolution], changed: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            kind(**(STEPS | changed))


class TestExchange:
    def test_attention_and_mlp_trade_with_each_other(self, space_of: SpaceOf) -> None:
        space = space_of((100, (8, 6, 4, 2, 0)), (2, (400, 300, 200, 100, 0)))
        assert children(make_problem(space, 0.5), 20) == {(1, 3), (3, 1)}

    def test_they_do_not_where_kinds_trade_alone(self, space_of: SpaceOf) -> None:
        space = space_of((100, (8, 6, 4, 2, 0)), (2, (400, 300, 200, 100, 0)), (100, (8, 6, 4, 2, 0)))
        problem = make_problem(space, 0.5)
        assert problem.start == (2, 2, 2)
        assert children(problem, 40, within_kind=True) == {
            (1, 2, 3),
            (3, 2, 1),
            None,
        }  # the MLP has nobody to trade with

    def test_a_switch_moves_two_units_where_costs_are_alike(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*[(10, (8, 7, 6, 5, 4, 3, 2, 1, 0))] * 10), 0.5)
        for count in (1, 2, 3):
            moved: Counter[int] = Counter()
            for seed in range(200):
                child = exchange(problem, problem.start, count, np.random.default_rng(seed))
                assert child is not None
                moved[sum(abs(a - b) for a, b in zip(child, problem.start, strict=True))] += 1
            assert max(moved) == 2 * count == moved.most_common(1)[0][0]  # fewer where switches undo each other
        pairs = {tuple(np.subtract(child, problem.start)) for child in children(problem, 3000) if child}
        assert len(pairs) == 10 * 9  # any unit with any other

    def test_what_a_large_payer_frees_goes_to_others(self, space_of: SpaceOf) -> None:
        # a step of the first unit is ten of the others'
        space = space_of((50, (4, 2, 0)), *[(10, (6, 5, 4, 3, 2, 1, 0))] * 2)
        problem = Problem(space, budget_of(space, 150), (1, 5, 2), Synthetic(space))
        assert problem.budget.met(problem.start)
        found = children(problem, 200)
        assert (1, 4, 3) in found  # the small ones trade
        assert (2, 0, 0) not in found  # would leave 30 of the budget
        bigger = Problem(space, budget_of(space, 120), (1, 6, 4), Synthetic(space))
        assert (2, 0, 0) in children(bigger, 200)  # the large one pays 100, of which the small ones spend all

    def test_several_small_ones_pay_for_a_large_one(self, space_of: SpaceOf) -> None:
        space = space_of((30, (2, 1, 0)), *[(10, (2, 1, 0))] * 4)
        problem = Problem(space, budget_of(space, 70), (1,) * 5, Synthetic(space))
        found = {child for child in children(problem, 200) if child}
        assert (0, 2, 2, 2, 1) in found  # the large one takes 30, of three small ones
        assert (2, 0, 1, 0, 0) in found  # and gives as much to three
        assert {problem.space.cost(child) for child in found} == {70}

    def test_most_offspring_make_one_switch(self) -> None:
        rng = np.random.default_rng(0)
        drawn = Counter(few(3, rng) for _ in range(9000))
        assert [round(drawn[number] / 1000) for number in (1, 2, 3)] == [5, 3, 1]

    @settings(deadline=None, max_examples=300)
    @given(
        seed=st.integers(0, 10_000),
        units=st.integers(1, 6),
        sparsity=st.floats(0.01, 0.95),
        count=st.integers(1, 6),
        within_kind=st.booleans(),
        data=st.data(),
    )
    def test_exchange(
        self,
        random_space: SpaceOf,
        seed: int,
        units: int,
        sparsity: float,
        count: int,
        within_kind: bool,
        data: st.DataObject,
    ) -> None:
        space = random_space(seed, units, levels=5)
        assume(space.dense_cost * (1 - sparsity) >= space.lowest_cost + 1)
        budget = Budget.from_sparsity(sparsity, space)
        wish = tuple(data.draw(st.integers(0, len(unit.levels) - 1)) for unit in space.units)
        problem = Problem(space, budget, closest(wish, budget), Synthetic(space))
        child = exchange(problem, problem.start, count, np.random.default_rng(seed), within_kind)
        if child is None:
            return
        assert all(0 <= level < len(unit.levels) for unit, level in zip(space.units, child, strict=True))
        assert problem.allows(child)
        assert budget.met(child) or not budget.met(problem.start)
        pairs = list(zip(child, problem.start, strict=True))
        if any(new > old for new, old in pairs):  # who pays, pays for somebody
            assert any(new < old for new, old in pairs)


class TestTyr:
    def test_kinds_keep_their_shares(self, random_space: SpaceOf) -> None:
        """Also where levels of a kind differ in cost."""
        for seed in range(8):
            problem = make_problem(random_space(seed, units=8, levels=8), 0.3, seed=seed)
            _, rows = run(Tyr(**STEPS), problem)
            units, costs = problem.space.units, problem.budget.first.costs
            for row in rows:
                assert keeps_shares(problem, row.allocation)
                for kind in ("attention", "mlp"):
                    own = [i for i, unit in enumerate(units) if unit.kind == kind]
                    steps = [a - b for i in own for a, b in zip(costs[i], costs[i][1:], strict=False)]
                    gained = sum(costs[i][row.allocation[i]] - costs[i][problem.start[i]] for i in own)
                    assert abs(gained) < min(steps, default=1)

    def test_even_levels_keep_them_exactly(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*TRANSFORMER), 0.5)
        states, rows = run(Tyr(**STEPS), problem)
        assert states[-1].parent != problem.start
        for row in rows:
            assert sum(row.allocation[0::2]) == sum(problem.start[0::2])
            assert sum(row.allocation[1::2]) == sum(problem.start[1::2])


class TestRandom:
    def test_spread_is_the_distance_from_the_start(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*TRANSFORMER * 2), 0.4)

        def away(spread: float) -> float:
            rows = last_step(
                run(
                    Random(**STEPS | {"generations": 1, "offspring": 30, "survivors": [30, 30, 1]}, spread=spread),
                    problem,
                )[1],
                0,
            )
            return float(np.mean([np.abs(np.subtract(row.allocation, problem.start)).mean() for row in rows[1:]]))

        near, middle, far = away(0.15), away(0.5), away(1.0)
        assert 0.0 < near < middle < far
        assert far > 1.5  # of eight levels

    def test_the_parent_does_not_matter(self, problem: Problem) -> None:
        other = tuple(8 - level for level in problem.start)
        drawn = [
            Random(**STEPS).propose(problem, parent, np.random.default_rng(0)) for parent in (problem.start, other)
        ]
        assert drawn[0] == drawn[1]
