"""Bonsai: pairs, regression, and what both find on losses that cost nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from search.strategies.rules.bonsai import Bonsai, pair_around, predicted, worths
from supernet.errors import InputError
from supernet.space import Allocation
from tests.search.rules import Smooth, problem_of, run
from tests.search.synthetic import SpaceOf, through_json


class TestBonsai:
    def test_pairs_mirror_each_other(self) -> None:
        rng, most = np.random.default_rng(0), np.array([8, 8, 1, 0, 4])
        start = (4, 4, 0, 0, 2)
        for _ in range(20):
            first, second = pair_around(start, most, 2, rng)
            for index in (0, 1, 4):
                assert first[index] + second[index] == 2 * start[index]
            assert all(
                0 <= v <= m and abs(v - s) <= 2
                for one in (first, second)
                for v, m, s in zip(one, most, start, strict=True)
            )
            assert (first[2] == 0 or second[2] == 0) and first[3] == second[3] == 0

    def test_a_linear_loss_is_found(self) -> None:
        rng = np.random.default_rng(0)
        removed = rng.normal(size=(200, 6)) / 60
        truth = np.array([1.0, 2.0, 0.5, 4.0, 3.0, 1.5])
        found = worths(removed, removed @ truth)
        assert found == pytest.approx(truth, rel=0.15)
        assert np.argsort(found).tolist() == np.argsort(truth).tolist()

    def test_noise_alone_leaves_the_prior(self) -> None:
        found = worths(np.zeros((4, 3)), np.zeros(4))
        assert np.isfinite(found).all()
        assert np.ptp(found) == 0.0

    def test_losses_and_reach(self) -> None:
        losses = predicted(np.array([2.0, 1.0]), ((10, 6, 2, 0), (10, 0)), 20, (1, 0), 1)
        assert losses[0][:3] == pytest.approx([0.0, 0.4, 0.8])
        assert losses[0][3] > 10 * (1.0 + 0.5)
        assert losses[1] == pytest.approx([0.0, 0.5])

    def test_it_moves_to_what_costs_little(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (8, 7, 6, 5, 4, 3, 2, 1, 0))] * 8), 0.5)
        state, rows = run(Bonsai(samples=120, tokens=60), problem)
        everything = np.arange(problem.evaluate.sequences)
        before, after = problem.evaluate([problem.start, state.parent], everything).mean(1)
        assert after < before
        assert all(abs(a - b) <= 2 for a, b in zip(state.parent, problem.start, strict=True))
        rates = np.random.default_rng(0).lognormal(size=8)
        assert [v > 4 for v in state.parent] == [rate < np.median(rates) for rate in rates]

    def test_what_is_measured_is_told(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 4), 0.5)
        rule = Bonsai(samples=10, tokens=30)
        state, rows = run(rule, problem)
        evaluator = problem.evaluate
        assert isinstance(evaluator, Smooth)
        assert state.tokens == sum(n * s for n, s in evaluator.calls) * 12
        assert len(rows) == 10 and {row.step for row in rows} == set(range(5))
        assert all(row.tokens == 36 and not row.survived for row in rows)
        assert rule.tokens_per_generation == 300

    def test_a_killed_run_goes_on_behind_its_last_portion(self, space_of: SpaceOf) -> None:
        problem, rule = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 6), 0.5), Bonsai(samples=50, tokens=30)
        whole, rows = run(rule, problem)
        assert (
            rule.generations == whole.generation == 3
            and [row.generation for row in rows] == [0] * 20 + [1] * 20 + [2] * 10
        )
        assert rule.tokens_per_generation == 500 and not whole.pairs
        state = rule.begin(problem, 0)
        for generation in range(3):
            state = through_json(state)
            assert state.parent == problem.start and len(state.pairs) == state.drawn == 10 * generation
            state, _ = rule.advance(problem, state)
        assert (state.parent, state.tokens, state.rng) == (whole.parent, whole.tokens, whole.rng)
        assert state.parent != problem.start

    def test_pairs_that_overflow_are_left_out(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 6), 0.5)

        class Overflowing(Smooth):
            def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
                lost = np.array([[a[0] > problem.start[0] + 1] for a in allocations])
                return np.where(lost, np.inf, super().__call__(allocations, chosen))

        state, rows = run(Bonsai(samples=50, tokens=30), replace(problem, evaluate=Overflowing(problem.space)))
        assert any(row.fitness == np.inf for row in rows)
        assert state.parent != problem.start and problem.allows(state.parent)

    def test_a_loss_that_is_not_finite(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 4), 0.5)

        class Lost(Smooth):
            def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
                return np.full((len(allocations), len(chosen)), math.nan)

        with pytest.raises(InputError, match="finite"):
            run(Bonsai(samples=4), replace(problem, evaluate=Lost(problem.space)))
