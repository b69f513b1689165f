"""Predictions by forward passes: the curves they weigh, and the weights they learn."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from search.budgets.budget import Budget, Limit
from search.strategies.base import Problem
from search.strategies.guided import proposals
from search.strategies.guided.proposals import CAUTION, DRAWN, PROPOSALS, curves_of, learned, prior_of, regressed
from search.strategies.measuring import Measured, Pair
from tests.search.synthetic import TRANSFORMER, SpaceOf, make_problem, synthetic

FORWARD = PROPOSALS["forward"]


def weights_of(problem: Problem) -> np.ndarray:
    """The logarithms of what the problem's losses are to its curves, without their mean."""
    curves = curves_of(problem)
    logarithms = np.log([loss[-1] / curve[-1] for loss, curve in zip(synthetic(problem).losses, curves, strict=True)])
    return np.asarray(logarithms - logarithms.mean())


class TestCurves:
    def test_together_they_are_1_at_the_start(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*TRANSFORMER))
        for errors in (problem.errors, None):
            curves = curves_of(replace(problem, errors=errors))
            assert sum(curve[level] for curve, level in zip(curves, problem.start, strict=True)) == pytest.approx(1.0)
            assert all(curve[0] == 0.0 and (np.diff(curve) > 0).all() for curve in curves)

    def test_without_errors_a_unit_loses_the_square_of_what_it_misses(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of(*TRANSFORMER))
        steep = replace(problem, errors=[[error**2 for error in row] for row in problem.errors or []])
        for without, exact, other in zip(*map(curves_of, (replace(problem, errors=None), problem, steep)), strict=True):
            assert_allclose(without, exact)
            assert other[-1] / other[1] > 2 * exact[-1] / exact[1]
        nothing = curves_of(replace(problem, errors=[[0.0, np.inf, *row[2:]] for row in problem.errors or []]))
        assert_allclose(np.concatenate(nothing), np.concatenate(curves_of(problem)))

    def test_what_time_a_level_takes_does_not_matter(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of((10, (4, 3, 2, 1)), (10, (4, 3, 2, 1))))
        times = ((100, 100, 50, 40), (100, 50, 50, 40))
        slow = replace(problem, budget=Budget((Limit("latency", 120, 200, times),)))
        assert_allclose(np.concatenate(curves_of(slow)), np.concatenate(curves_of(problem)))

    def test_a_sparser_level_never_gains(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of((10, (4, 3, 2, 1)), (10, (4, 3, 2, 1))))
        for curve in curves_of(replace(problem, errors=[[0.0, 0.5, 0.4, 0.6], [0.0, 0.1, 0.2, 0.1]])):
            assert (np.diff(curve) >= 0).all() and curve[-1] > 0

    def test_errors_in_front_of_a_unit_are_not_its_own(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of((10, (4, 3, 2, 1)), (10, (4, 3, 2, 1))))
        own = [[0.0, 0.01, 0.03, 0.1], [0.0, 0.02, 0.04, 0.2]]
        missed = [own[0], [0.0, *(0.5 + error for error in own[1][1:])]]
        expected, found = (curves_of(replace(problem, errors=errors)) for errors in (own, missed))
        for one, other in zip(expected, found, strict=True):
            assert_allclose(other, one)

    def test_units_with_two_levels_keep_their_error(self, space_of: SpaceOf) -> None:
        problem = make_problem(space_of((10, (4, 0)), (10, (4, 0))), 0.5)
        first, second = curves_of(replace(problem, errors=[[0.0, 0.2], [0.0, 0.6]]))
        assert second[1] == pytest.approx(3 * first[1])


def random_regression(pairs: int, units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(pairs)
    return rng.normal(size=(pairs, units)), rng.normal(size=pairs), np.tril(rng.normal(size=(units, units)))


@pytest.mark.parametrize(("pairs", "units"), [(5, 8), (20, 8), (12, 12)])
def test_the_dual_form_is_ridge_regression(pairs: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "STRENGTHS", (0.7,))
    moved, differences, root = random_regression(pairs, units)
    chosen = 0.7 if pairs >= proposals.FOLDS else 1.0
    covariance = root @ root.T
    mean, rest = np.diag(moved @ covariance @ moved.T).mean(), differences - moved.sum(1)
    noise = np.random.default_rng(0).uniform(0.2, 1.0, size=pairs)
    for more, found in zip(CAUTION, regressed(moved, differences, noise, np.arange(pairs), root), strict=True):
        penalty = chosen * more * mean * np.linalg.inv(covariance)
        weighted = moved.T / noise
        assert_allclose(found, np.linalg.solve(weighted @ moved + penalty, weighted @ rest), rtol=1e-6, atol=1e-9)


def test_the_strength_that_ranks_left_out_pairs_best_is_taken() -> None:
    rng = np.random.default_rng(0)
    moved, root = rng.normal(size=(60, 6)), np.eye(6)
    truth = rng.normal(size=6)
    clean, order = moved @ truth, rng.permutation(60)
    believed, doubted = (
        np.linalg.norm(regressed(moved, y + moved.sum(1), np.ones(60), np.arange(60), root)[0])
        for y in (clean, clean[order])
    )
    assert believed > 3 * doubted


def test_pairs_of_a_group_are_left_out_together() -> None:
    """Copies of a pair predict each other, whatever they say: only where they are apart does noise look like
    knowledge.
    """
    rng = np.random.default_rng(0)
    moved, noise = np.repeat(rng.normal(size=(16, 40)), 2, 0), np.repeat(rng.normal(size=16), 2)
    noise += moved.sum(1)
    apart, together = (
        np.linalg.norm(regressed(moved, noise, np.ones(32), g, np.eye(40))[0])
        for g in (np.arange(32), np.arange(32) // 2)
    )
    assert apart > together


def test_alike_are_units_of_a_kind_and_of_like_depth(space_of: SpaceOf) -> None:
    covariance = prior_of(make_problem(space_of(*TRANSFORMER)))
    assert covariance[0, 2] > covariance[0, 1] and covariance[0, 6] > covariance[0, 1]  # attention like attention
    assert_allclose(np.diag(covariance), 1.0)
    assert_allclose(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_weights_are_learned_from_pairs(space_of: SpaceOf) -> None:
    problem = make_problem(space_of(*TRANSFORMER * 3), sequence_length=16)
    truth, correlations = weights_of(problem), []
    for count in (4, 40):
        measured = Measured(problem, 0)
        _, pairs = FORWARD.predict(problem, measured, problem.start, (), range(count), np.random.default_rng(1))
        assert measured.tokens == FORWARD.cost * count * 16
        root = np.linalg.cholesky(prior_of(problem))
        correlations.append(np.corrcoef(learned(pairs, curves_of(problem), root)[0], truth)[0, 1])
    assert correlations[1] > max(0.7, correlations[0])


def test_sides_of_a_pair_meet_the_budget_and_are_opposite(space_of: SpaceOf) -> None:
    problem = make_problem(space_of(*TRANSFORMER * 3))
    _, pairs = FORWARD.predict(problem, Measured(problem, 0), problem.start, (), range(8), np.random.default_rng(0))
    assert len(pairs) == 8
    exact = synthetic(problem).exact
    for pair in pairs:
        assert pair.sequences == 1
        assert problem.budget.met(pair.first) and problem.budget.met(pair.second)
        assert pair.difference == pytest.approx(exact(pair.first) - exact(pair.second))
        assert np.dot(np.subtract(pair.first, problem.start), np.subtract(pair.second, problem.start)) < 0


def test_predictions_are_changes_from_the_parent(space_of: SpaceOf) -> None:
    problem = make_problem(space_of(*TRANSFORMER))
    found, _ = FORWARD.predict(problem, Measured(problem, 0), problem.start, (), [0, 1], np.random.default_rng(0))
    assert len(found) == len(CAUTION) + DRAWN
    for changes in found:
        assert all(change[level] == 0.0 for change, level in zip(changes, problem.start, strict=True))


def test_what_was_measured_on_more_sequences_counts_more(space_of: SpaceOf) -> None:
    """Two pairs that contradict each other."""
    problem = make_problem(space_of(*[(10, (4, 2, 0))] * 2))
    heavier = [
        learned([Pair((0, 2), (2, 0), 0.1, first), Pair((2, 0), (0, 2), 0.1, second)], curves_of(problem), np.eye(2))[0]
        for first, second in ((16, 1), (1, 16), (4, 4))
    ]
    assert heavier[0][0] < heavier[2][0] < heavier[1][0]


@pytest.mark.parametrize("pairs", [[], [Pair((1, 1), (1, 1), 0.0, 1)]])
def test_nothing_to_learn_from_leaves_the_weights_alike(pairs: list[Pair], space_of: SpaceOf) -> None:
    problem = make_problem(space_of((10, (4, 2)), (10, (4, 2))), 0.2)
    for logarithms in learned(pairs, curves_of(problem), np.eye(2)):
        assert_allclose(logarithms, 0.0)
