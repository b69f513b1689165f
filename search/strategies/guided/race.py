"""Races offspring against each other and against their parent, with few sequences for most and more for close ones.

Losses differ much more from sequence to sequence than from offspring to parent, so only differences on the same
sequences count. Each step measures the offspring on twice as many sequences, drops those that are clearly behind the
leader, and keeps at most half of the field. The last offspring is judged against the parent on sequences that it was
not chosen on. A single sequence proves nothing, however large the difference, and a loss that is not finite loses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.strategies.base import FEWEST_SEQUENCES
from search.strategies.measuring import Measured
from supernet.space import Allocation

LAST = 0.5  # this share of the standard errors is enough once all sequences have been measured


@dataclass(frozen=True)
class Outcome:
    """How a race ended.

    Attributes:
        leader: The best of the offspring.
        gain: By how much its mean loss is below the parent's on the same sequences.
        error: The standard error of the gain.
        sequences: Which sequences it was judged on.
        clear: Whether the gain is so large that noise does not explain it.
    """

    leader: Allocation
    gain: float
    error: float
    sequences: tuple[int, ...]
    clear: bool


def race(
    measured: Measured,
    parent: Allocation,
    offspring: Sequence[Allocation],
    order: Sequence[int],
    enough: int,
    most: int,
    errors: float,
) -> Outcome:
    """Find the best offspring, and decide whether it is clearly better than the parent.

    The leader is found on some sequences and judged on others, because the best of many looks better than it is on the
    sequences that it was chosen on.

    Args:
        measured: Measures allocations and counts the tokens.
        parent: The allocation to beat.
        offspring: Distinct allocations, all different from the parent.
        order: The sequences to measure on, in the order in which they are taken.
        enough: On how many of them the leader is found at most.
        most: On how many others it is judged at most.
        errors: By how many standard errors a gain must exceed 0 to be clear, if they were known exactly; half as many
            once all sequences have been measured.
    """
    alive, sequences = list(offspring), 1
    enough = min(enough, max(1, len(order) // 2))
    while True:
        alive = _selected(measured, parent, alive, order[:sequences], errors)
        if len(alive) == 1 or sequences >= enough:
            break
        sequences = min(2 * sequences, enough)
    fresh = order[sequences:] or order  # a pool of one sequence has no others
    return _judged(measured, parent, alive[0], fresh[:most], errors)


def _selected(
    measured: Measured, parent: Allocation, alive: Sequence[Allocation], sequences: Sequence[int], errors: float
) -> list[Allocation]:
    """Return the offspring that stay in the race, best first.

    These are the ones whose loss is not clearly higher than the leader's, and at most half of the field, rounded up.
    """
    begun = time.perf_counter()
    losses = measured.losses([parent, *alive], sequences)
    means = losses.mean(1)
    ranked = [int(i) for i in np.argsort(means[1:], kind="stable")]
    leader = losses[1 + ranked[0]]
    finite = [i for i in ranked if math.isfinite(means[1 + i])]
    close = [i for i in finite if not _clearly_above(losses[1 + i] - leader, errors)] or ranked[:1]
    kept = close[: -(-len(alive) // 2)]
    measured.note([parent, *alive], means, len(sequences), {1 + i for i in kept}, time.perf_counter() - begun)
    return [alive[i] for i in kept]


def _clearly_above(differences: np.ndarray, errors: float) -> bool:
    """Return whether the mean of paired differences, (sequences,), is above 0 by more than so many standard errors."""
    return bool(differences.mean() > errors * standard_error(differences))


def _judged(measured: Measured, parent: Allocation, leader: Allocation, fresh: Sequence[int], errors: float) -> Outcome:
    """Judge the leader against the parent on fresh sequences: on a few, then on twice as many, until it is clear.

    Once all sequences have been measured, half of the standard errors are enough: a gain that is more likely real than
    not is worth taking when nothing more may be spent on the question. The race ends early, and the parent stays, if
    the gain could not become clear even if it were the same on all the sequences left.
    """
    sequences = min(FEWEST_SEQUENCES, len(fresh))
    while True:
        begun = time.perf_counter()
        losses = measured.losses([parent, leader], fresh[:sequences])
        if not np.isfinite(losses).all():
            better = bool(np.isfinite(losses[1]).all())  # then it is the parent that is not finite
            measured.note([parent, leader], losses.mean(1), sequences, {int(better)}, time.perf_counter() - begun)
            return Outcome(leader, math.inf if better else -math.inf, 0.0, tuple(fresh[:sequences]), better)
        gains = losses[0] - losses[1]
        gain, error = float(gains.mean()), standard_error(gains)
        last = sequences == len(fresh)
        hope = critical(LAST * errors, len(fresh)) * error * (sequences / len(fresh)) ** 0.5
        clear = gain > 0 and gain > (hope if last else critical(errors, sequences) * error)
        over = clear or last or gain <= max(0.0, hope)
        survived = {1} if clear or not over else {0}
        measured.note([parent, leader], losses.mean(1), sequences, survived, time.perf_counter() - begun)
        if over:
            return Outcome(leader, gain, error, tuple(fresh[:sequences]), clear)
        sequences = min(2 * sequences, len(fresh))


def standard_error(differences: np.ndarray) -> float:
    """Return the standard error of the mean of paired differences, (sequences,); infinite for a single difference."""
    return float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else math.inf


def critical(errors: float, sequences: int) -> float:
    """Return how many estimated standard errors are as rare as so many exactly known ones.

    With few sequences this is more, by the quantile of Student's t, which is expanded after Cornish and Fisher.
    """
    z, freedom = errors, max(1, sequences - 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
