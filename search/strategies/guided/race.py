"""Racing offspring against their parent: paired on the same sequences, few of them for most, more for those that are
close.

Losses differ much more from sequence to sequence than from offspring to parent, so only differences on the same
sequences count. What is measured on few sequences is carried to the next step, which doubles them; there, whoever is
clearly behind the leader is dropped, and half of the field in any case. The last one is judged against the parent on
sequences that it was not chosen on. A single sequence proves nothing, whatever the difference is on it. An allocation
whose loss is not finite has lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.strategies.base import FEWEST
from search.strategies.measuring import Measured
from supernet.space import Allocation

LAST = 0.5  # of the standard errors that a gain must exceed: enough at the last look


@dataclass(frozen=True)
class Outcome:
    """How a race ended.

    Attributes:
        leader: The best of the offspring.
        gain: By how much its loss is below the parent's, on the same sequences.
        error: Standard error of that.
        sequences: Those that it was judged on.
        clear: Whether the gain is one that noise does not explain.
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
    """The best offspring, and whether it is to be the parent.

    The leader is found on some sequences and judged on others: the best of many on the same sequences looks better than
    it is.

    Args:
        measured: Measures, counts, and keeps what is known.
        parent: What is to be beaten.
        offspring: Distinct, none like the parent.
        order: Sequences to measure on, the first ones first.
        enough: How many of them the leader is found on at most.
        most: How many it is judged on at most.
        errors: Standard errors that a gain must exceed to be clear, if they were known exactly; half as many at the
            last look.
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
    """One selection step: those not clearly behind the leader, no more than half, rounded up, best first."""
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
    """Whether paired differences, (sequences,), are above 0 by more than so many standard errors."""
    return bool(differences.mean() > errors * standard_error(differences))


def _judged(measured: Measured, parent: Allocation, leader: Allocation, fresh: Sequence[int], errors: float) -> Outcome:
    """Parent and leader on sequences that the leader was not found on: a few first, twice as many until the answer is
    clear.

    At the last look half of the errors are enough: a gain that is more likely real than not is worth having, once all
    that may be spent on the question has been. A leader whose gain would not be clear there if it stayed what it is has
    lost at once.
    """
    sequences = min(FEWEST, len(fresh))
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
    """Standard error of the mean of paired differences, (sequences,); infinite for a single one, which says nothing of
    others.
    """
    return float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else math.inf


def critical(errors: float, sequences: int) -> float:
    """How many estimated standard errors are as rare as so many known ones: Student's t of few sequences
    (Cornish-Fisher).
    """
    z, freedom = errors, max(1, sequences - 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
