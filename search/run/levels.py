"""Which levels each unit gets in a round: a coarse grid first, then ever finer windows around the allocation found.

Together with a space comes its *mixture*: the weight of every level in what the next sub-block sees while candidates
are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from supernet.errors import InputError
from supernet.models.prunables import Prunable
from supernet.space import Allocation, Space, Unit, kept_counts

Mixture = dict[str, tuple[float, ...]]
ACCUMULATIONS = ("none", "chosen", "expectation")


@dataclass(frozen=True)
class Window:
    """The space of a round, and the units whose dense level lies in the window and was not only added to it."""

    space: Space
    dense: frozenset[str]


@dataclass(frozen=True)
class Grid:
    """The levels of all rounds.

    Attributes:
        levels: Levels a unit has in a round, before those that round to the same number of members are merged.
        step: Spacing of their sparsities in the first round; every later round halves it.
        lowest: Sparsity of the first of them in the first round.
    """

    levels: int
    step: float
    lowest: float = 0.0

    def __post_init__(self) -> None:
        usual = "9 levels of 0.125 from 0 cover everything"
        if self.levels < 2:
            raise InputError(f"supernet.levels={self.levels} must be at least 2; {usual}")
        if not 0.0 < self.step < 1.0:
            raise InputError(f"supernet.step={self.step} must be above 0 and below 1; {usual}")
        if not 0.0 <= self.lowest < 1.0:
            raise InputError(f"supernet.lowest={self.lowest} must be at least 0 and below 1; {usual}")

    def first(self, prunables: Sequence[Prunable]) -> Window:
        """Return the coarse grid: sparsities lowest, lowest + step, lowest + 2 step, ... up to at most 1."""
        return _window(prunables, range(self.levels), self.step, {p.name: self.lowest for p in prunables})

    def around(self, prunables: Sequence[Prunable], kept: Mapping[str, int], refinement: int) -> Window:
        """Return the grid of a later round: as many levels, spaced step / 2^refinement, around what was kept so far."""
        half = self.levels // 2
        centres = {p.name: 1.0 - kept[p.name] / p.total for p in prunables}
        return _window(prunables, range(-half, half + 1), self.step / 2**refinement, centres)


def _window(prunables: Sequence[Prunable], ticks: range, step: float, centres: Mapping[str, float]) -> Window:
    units, dense = [], set()
    for one in prunables:
        if one.choices is not None:
            units.append(Unit(one.name, one.kind, one.total, one.choices))
            dense.add(one.name)
            continue
        sparsities = [min(1.0, max(0.0, centres[one.name] + tick * step)) for tick in ticks]
        units.append(_unit(one, kept_counts(one.total, sparsities, one.multiple)))
        if min(sparsities) * one.total < one.multiple / 2:
            dense.add(one.name)
    return Window(Space(tuple(units)), frozenset(dense))


def _unit(one: Prunable, counts: Sequence[int]) -> Unit:
    return Unit(one.name, one.kind, one.total, tuple(one.level(kept) for kept in counts))


def mixture(window: Window, accumulation: str, around: Allocation) -> Mixture:
    """Return the weight of every level in what the next sub-block sees while candidates are built.

    Args:
        window: The units and their levels.
        accumulation: `none`, the dense model's activations throughout (EvoPress); `chosen`, those of the allocation
            `around`; `expectation`, the mean over levels, each in proportion to what it keeps (Týr-the-Pruner, section
            3.2).
        around: The allocation known so far: uniform in the first round, then what the last round found.
    """
    weights: Mixture = {}
    for unit, level in zip(window.space.units, around, strict=True):
        if accumulation == "expectation":
            weights[unit.name] = _expectation([level.kept for level in unit.levels], unit.name in window.dense)
        else:
            weights[unit.name] = _on(0 if accumulation == "none" else level, len(unit.levels))
    return weights


def check_accumulation(accumulation: str) -> None:
    """InputError for an accumulation that is not known."""
    if accumulation not in ACCUMULATIONS:
        raise InputError(f"prune.accumulation={accumulation} is not known; choose one of {', '.join(ACCUMULATIONS)}")


def _on(level: int, levels: int) -> tuple[float, ...]:
    return tuple(float(index == level) for index in range(levels))


def _expectation(counts: Sequence[int], with_dense: bool) -> tuple[float, ...]:
    """Return weights in proportion to what levels keep. A dense level that was only added to the window has none."""
    weights = [float(count) for count in counts]
    if not with_dense:
        weights[0] = 0.0
        if not any(weights):  # the window holds nothing but the absent sub-block
            weights[-1] = 1.0
    return tuple(weight / sum(weights) for weight in weights)


def exact(prunables: Sequence[Prunable], kept: Mapping[str, int], accumulation: str) -> tuple[Space, Mixture]:
    """Return a space with one allocation to choose, and the mixture that is its exact error accumulation.

    For the last rebuild along an allocation. Without accumulation its candidates see the dense model's activations, as
    those of the rounds did.
    """
    units = []
    for one in prunables:
        sparser = kept[one.name] < one.total
        units.append(_unit(one, (one.total, kept[one.name]) if sparser else (one.total,)))
    last = 0 if accumulation == "none" else -1
    return Space(tuple(units)), {u.name: _on(last % len(u.levels), len(u.levels)) for u in units}
