"""A race finds the best offspring on few tokens, and leaves the parent for what is better on others."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from search.strategies.base import Problem
from search.strategies.guided.race import Outcome, race
from search.strategies.measuring import Measured
from supernet.space import Allocation

PARENT = (0,)
SEQUENCES = 48


class Matrix:
    """An evaluator whose losses are given: a row for each allocation, a column for each sequence."""

    def __init__(self, losses: np.ndarray) -> None:
        self.table, (_, self.sequences), self.sequence_length = losses, losses.shape, 1
        self.judged: list[set[int]] = [set() for _ in losses]

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        for (row,) in allocations:
            self.judged[row] |= set(chosen.tolist())
        return self.table[[row for (row,) in allocations]][:, chosen]


def run(losses: np.ndarray, enough: int = 8, most: int = 32, errors: float = 2.0) -> tuple[Outcome, Measured, Matrix]:
    """A race of all rows but the first against it, sequences in order."""
    matrix = Matrix(losses)
    measured = Measured(cast(Problem, SimpleNamespace(evaluate=matrix)), 0)
    offspring = [(row,) for row in range(1, len(losses))]
    return race(measured, PARENT, offspring, range(losses.shape[1]), enough, most, errors), measured, matrix


def noise(rows: int, seed: int, scale: float = 1.0, shared: float = 3.0) -> np.ndarray:
    """What sequences add: much to all alike, a little to each."""
    rng = np.random.default_rng(seed)
    return scale * (rng.normal(size=(rows, SEQUENCES)) + shared * rng.normal(size=SEQUENCES))


def test_a_large_gain_is_clear_at_the_first_look() -> None:
    losses = noise(4, seed=0, scale=0.1)
    losses[2] -= 2.0
    outcome, measured, _ = run(losses)
    assert outcome.leader == (2,)
    assert outcome.clear
    assert len(outcome.sequences) == 4
    assert outcome.gain == pytest.approx(2.0, abs=0.3)
    assert measured.tokens < 4 * 8


def test_a_leader_that_is_no_better_has_lost_at_the_first_look() -> None:
    losses = noise(4, seed=0, scale=0.1)
    losses[1:] += 1.0
    outcome, _, _ = run(losses)
    assert not outcome.clear
    assert outcome.gain < 0
    assert len(outcome.sequences) == 4


@pytest.mark.parametrize(("gain", "clear", "looked"), [(1.5, True, 32), (0.5, False, 4)])
def test_at_the_last_look_half_of_the_errors_are_enough(gain: float, clear: bool, looked: int) -> None:
    """A gain of so many standard errors of 32 sequences, spread evenly: no earlier look is clear; too small a one has
    no hope.
    """
    losses = np.zeros((2, 40))
    losses[0] = np.tile([1.0, -1.0], 20) + gain / 32**0.5
    outcome, _, _ = run(losses)
    assert outcome.clear == clear
    assert len(outcome.sequences) == looked
    assert outcome.gain == pytest.approx(gain / 32**0.5)


def test_a_single_offspring_is_judged_on_what_it_was_not_found_on() -> None:
    outcome, _, matrix = run(noise(2, seed=0))
    assert outcome.leader == (1,)
    assert set(outcome.sequences).isdisjoint({0})
    assert matrix.judged[0] == matrix.judged[1]


def test_the_leader_is_judged_on_other_sequences_than_it_was_found_on() -> None:
    outcome, _, matrix = run(noise(9, seed=1))
    found_on = set().union(*(seen for row, seen in enumerate(matrix.judged) if (row,) not in (PARENT, outcome.leader)))
    assert found_on
    assert set(outcome.sequences).isdisjoint(found_on)
    assert matrix.judged[outcome.leader[0]] == found_on | set(outcome.sequences)


def test_noise_rarely_moves_the_parent() -> None:
    """Eight offspring as good as their parent."""
    moved = [run(noise(9, seed))[0].clear for seed in range(150)]
    assert np.mean(moved) < 0.2


def test_worse_offspring_almost_never_move_the_parent() -> None:
    """Each worse by one standard error of what it is judged on at most."""
    moved = []
    for seed in range(150):
        losses = noise(9, seed)
        losses[1:] += (2 / 32) ** 0.5
        moved.append(run(losses)[0].clear)
    assert np.mean(moved) < 0.08


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("errors", [0.0, 2.0])
def test_one_sequence_proves_nothing(sequences: int, errors: float) -> None:
    """Of a pool of two, the leader is found on one, and judged on the other."""
    losses = np.array([[1.0], [0.5], [0.7]]) + np.zeros(sequences)
    outcome, _, _ = run(losses, errors=errors)
    assert (outcome.leader, outcome.clear) == ((1,), False)
    assert len(outcome.sequences) == 1
    assert outcome.error == np.inf


def null_acceptance(pool: int, runs: int = 300) -> float:
    """How often one of eight offspring that are as good as their parent replaces it; losses are those of t with 4
    degrees.
    """
    rng = np.random.default_rng(pool)
    losses = [rng.standard_t(4, size=(9, pool)) + 3.0 * rng.normal(size=pool) for _ in range(runs)]
    return float(np.mean([run(one)[0].clear for one in losses]))


@pytest.mark.parametrize(("pool", "most"), [(1, 0.0), (2, 0.0), (3, 0.2), (4, 0.2), (8, 0.2), (64, 0.2)])
def test_noise_with_heavy_tails_rarely_moves_the_parent_whatever_the_pool(pool: int, most: float) -> None:
    assert null_acceptance(pool) <= most


class TestLossesThatAreNotFinite:
    @pytest.mark.parametrize("lost", [[0], [5], range(SEQUENCES)])
    def test_an_offspring_loses(self, lost: Sequence[int]) -> None:
        losses = noise(4, seed=0, scale=0.1)
        losses[2] -= 2.0
        losses[1] -= 3.0
        losses[1, list(lost)] = np.inf
        outcome, _, _ = run(losses)
        assert outcome.clear == (outcome.leader == (2,))

    def test_all_offspring_lose(self) -> None:
        losses = np.zeros((4, SEQUENCES))
        losses[1:] = np.inf
        outcome, measured, _ = run(losses)
        assert not outcome.clear
        assert outcome.gain == -np.inf
        assert measured.tokens < 4 * 8

    def test_a_parent_loses_to_what_is_finite(self) -> None:
        losses = noise(4, seed=0, scale=0.1)
        losses[0] = np.inf
        losses[3] -= 2.0
        outcome, _, _ = run(losses)
        assert (outcome.leader, outcome.clear) == ((3,), True)

    def test_where_nothing_is_finite_the_parent_stays(self) -> None:
        assert not run(np.full((4, SEQUENCES), np.inf))[0].clear
