"""Racing offspring against their parent: paired on the same sequences, few of them for most, more for those that are close.

Losses differ much more from sequence to sequence than from offspring to parent, so only differences on the same sequences count.
What is measured on few sequences is carried to the next step, which doubles them; there, whoever is clearly behind the leader is
dropped, and half of the field in any case. The parent is left only for what is clearly better.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.strategies.measuring import Measured
from supernet.space import Allocation

FEWEST = 4  # sequences that a difference must be seen on, unless there are no more


@dataclass(frozen=True)
class Outcome:
    """How a race ended.

    Attributes:
        leader: The best of the offspring.
        gain: By how much its loss is below the parent's, on the same sequences.
        error: Standard error of that.
        sequences: How many those are.
        clear: Whether the gain is one that noise does not explain.
    """

    leader: Allocation
    gain: float
    error: float
    sequences: int
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

    Args:
        measured: Measures, counts, and keeps what is known.
        parent: What is to be beaten.
        offspring: Distinct, none like the parent.
        order: Sequences to measure on, the first ones first.
        enough: How many of them are enough where a gain is clear.
        most: How many are measured to see a gain that is not.
        errors: Standard errors that a difference must exceed to be clear.
    """
    alive, sequences = list(offspring), 1
    enough, most = min(enough, len(order)), min(most, len(order))
    while True:
        begun = time.perf_counter()
        losses = measured.losses([parent, *alive], order[:sequences])
        gains = losses[0] - losses[1:]
        best = int(gains.mean(1).argmax())
        gain, error = float(gains[best].mean()), standard_error(gains[best])
        clear = gain > errors * error and gain > 0
        over = sequences >= most or (
            sequences >= min(FEWEST, enough) and ((clear and (len(alive) == 1 or sequences >= enough)) or gain < -errors * error)
        )
        staying = [best] if over else _staying(gains, best, errors)
        survived = {0} if over and not clear else {1 + index for index in staying}
        measured.note([parent, *alive], losses.mean(1), sequences, survived, time.perf_counter() - begun)
        if over:
            return Outcome(alive[best], gain, error, sequences, clear)
        alive = [alive[index] for index in staying]
        sequences = min(2 * sequences, most)


def standard_error(differences: np.ndarray) -> float:
    """Of the mean of paired differences, (sequences,); infinite for a single one that has others beside it unseen."""
    return float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else 0.0


def _staying(gains: np.ndarray, best: int, errors: float) -> list[int]:
    """Which offspring go on, best first: those not clearly behind the leader, and no more than half of them, rounded up."""
    behind = gains[best] - gains
    close = [index for index in range(len(gains)) if behind[index].mean() <= errors * standard_error(behind[index])]
    if gains.shape[1] == 1:
        close = list(range(len(gains)))  # a single sequence says nothing of its error
    ranked = sorted(close, key=lambda index: -gains[index].mean())
    return ranked[: -(-len(gains) // 2)]
