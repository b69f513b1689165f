"""Which levels each unit gets in a round: a coarse grid first, then ever finer windows around the allocation found.

Together with a space comes its *mixture*: the weight of every level in what the next sub-block sees while candidates are
built (expectation error accumulation, Týr-the-Pruner, section 3.2: a level counts in proportion to what it keeps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from supernet.architecture import MLP, SubBlock
from supernet.errors import InputError
from supernet.space import Space, Unit, check_multiple, kept_counts, unit_of

Mixture = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Grid:
    """Levels of all rounds.

    Attributes:
        levels: Levels a unit has in a round, before those that round to the same number of members are merged.
        step: Spacing of their sparsities in the first round; every later round halves it.
        multiple: Neuron counts are rounded to this.
    """

    levels: int
    step: float
    multiple: int

    def __post_init__(self) -> None:
        if self.levels < 2 or not 0.0 < self.step < 1.0:
            raise InputError(
                f"supernet.levels={self.levels} must be at least 2 and supernet.step={self.step} between 0 and 1; "
                "9 levels of 0.125 cover everything"
            )

    def first(self, parts: Sequence[SubBlock]) -> tuple[Space, Mixture]:
        """The coarse grid: sparsities 0, step, 2 step, ... up to at most 1."""
        return self._space(
            parts, {part.name: (0, self.levels) for part in parts}, self.step, dict.fromkeys((p.name for p in parts), 0.0)
        )

    def around(self, parts: Sequence[SubBlock], kept: Mapping[str, int], refinement: int) -> tuple[Space, Mixture]:
        """The grid of a later round: as many levels, spaced step / 2^refinement, around the members kept so far."""
        half = self.levels // 2
        centres = {part.name: 1.0 - kept[part.name] / part.members for part in parts}
        return self._space(parts, {part.name: (-half, half + 1) for part in parts}, self.step / 2**refinement, centres)

    def _space(
        self, parts: Sequence[SubBlock], ranges: Mapping[str, tuple[int, int]], step: float, centres: Mapping[str, float]
    ) -> tuple[Space, Mixture]:
        units: list[Unit] = []
        mixture: Mixture = {}
        for part in parts:
            if part.kind == MLP:
                check_multiple(self.multiple, part.members)
            sparsities = [min(1.0, max(0.0, centres[part.name] + k * step)) for k in range(*ranges[part.name])]
            multiple = self.multiple if part.kind == MLP else 1
            counts = kept_counts(part.members, sparsities, multiple)
            window_starts_dense = min(sparsities) * part.members < multiple / 2
            units.append(unit_of(part, counts))
            mixture[part.name] = _expectation(counts, window_starts_dense)
        return Space(tuple(units)), mixture


def _expectation(counts: Sequence[int], with_dense: bool) -> tuple[float, ...]:
    """Weights in proportion to what levels keep; the dense level, which every unit has, only where the window holds it."""
    weights = [float(count) for count in counts]
    if not with_dense:
        weights[0] = 0.0
        if not any(weights):  # the window holds nothing but the absent sub-block
            weights[-1] = 1.0
    return tuple(weight / sum(weights) for weight in weights)


def exact(parts: Sequence[SubBlock], kept: Mapping[str, int]) -> tuple[Space, Mixture]:
    """A space with one allocation to choose, its exact error accumulation as mixture: for the last rebuild along it."""
    units: list[Unit] = []
    mixture: Mixture = {}
    for part in parts:
        sparser = kept[part.name] < part.members
        units.append(unit_of(part, (part.members, kept[part.name]) if sparser else (part.members,)))
        mixture[part.name] = (0.0, 1.0) if sparser else (1.0,)
    return Space(tuple(units)), mixture
