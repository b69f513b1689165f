"""An allocation taken from the front of an earlier run (`search.strategies.guided.pareto`) at any of its budgets: no
search.

Between two points of the front each unit keeps what lies between the two allocations, in proportion to cost. What comes
of that has not been measured by the earlier run, so it is measured beside what the two points have, repaired to the
budget, and the allocation that the round starts at (uniform in the first): the best of these is taken. `front.json`,
which holds a front, is written and read here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from search.budgets.budget import Budget, Limit
from search.budgets.knapsack import closest
from search.errors import reason
from search.strategies.base import FrontPoint, HistoryRow, Problem
from search.strategies.checks import check_whole
from search.strategies.measuring import Measured, sequences_for
from search.strategies.rules.base import Rule, only_allocation, towards
from search.strategies.state import State, rng_state
from supernet.errors import InputError
from supernet.space import Space
from supernet.system.records import WRONG, UnreadableError, read_json, verified

log = logging.getLogger(__name__)

FORMAT = 2
CANDIDATES = 4  # that may be measured: in between, beside, the start

Kept = Mapping[str, int]  # members kept per unit


@dataclass(frozen=True)
class Front(Rule):
    """The rule.

    Attributes:
        file: A `front.json`.
        tokens: Of the search text, that allocations between two points are measured on; 0 takes the one in between as
            it is.
    """

    name: ClassVar[str] = "front"
    looks_at: ClassVar[str] = "strategy.file alone"

    file: str
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens, 0)
        _ = self.points  # a file that cannot be read should not wait for a build

    @property
    def needs_candidates(self) -> bool:
        """Return whether what lies between two points of the front is measured."""
        return self.tokens > 0

    @property
    def tokens_per_generation(self) -> int:
        """Count one measurement of each allocation that may be taken."""
        return CANDIDATES * self.tokens

    def check_rounds(self, rounds: int) -> None:
        """Advise against more than one round, each of which is built for little."""
        if rounds != 1:
            log.warning(
                "rounds=%d with strategy=front: every round is built, for levels a little nearer to the front; "
                "rounds=1 will do",
                rounds,
            )

    def check_budget(self, space: Space, budget: Budget) -> None:
        """Refuse a budget sparser than all of the front, and a front of other units."""
        self.place(space, budget)

    @cached_property
    def points(self) -> list[Kept]:
        """From the sparsest to the dense model."""
        return read_front(self.file)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Take what lies on the front at the budget, after a measurement where that is between two points."""
        if only_allocation(problem) is not None:
            return super().advance(problem, state)
        place = self.place(problem.space, problem.budget)
        wished, below = towards(problem, self._sparsities(place, problem)), int(place)
        beside = [problem.space.nearest(dict(kept)) for kept in self.points[below : below + 2]]
        others = [*(closest(one, problem.budget) for one in beside), problem.start]
        candidates = list(dict.fromkeys([wished, *(one for one in others if problem.allows(one))]))
        if problem.space.kept(wished) in self.points or not self.tokens or len(candidates) == 1:
            return replace(state, parent=wished, generation=1), []
        rng, measured = state.generator(), Measured(problem, state.generation)
        sequences = rng.permutation(problem.evaluate.sequences)[: sequences_for(self.tokens, problem)]
        (best,) = measured.step(candidates, sequences, 1)
        fitness = float(measured.losses([best], sequences).mean())
        return State(best, fitness, 1, state.tokens + measured.tokens, rng_state(rng)), measured.rows

    def _sparsities(self, place: float, problem: Problem) -> np.ndarray:
        """What the front wishes for every unit at a place, (units,), of what the leading limit counts."""
        costs = _costs(self.points, problem.space, problem.budget.leading)  # (points, units)
        below = min(int(place), len(costs) - 2)
        wish = costs[below] + (place - below) * (costs[below + 1] - costs[below])
        return np.asarray(1.0 - wish / np.maximum(1, costs[-1]))

    def place(self, space: Space, budget: Budget) -> float:
        """How far along the front the budget goes: 1.5 is half way from point 1 to point 2; InputError where it has no
        answer.
        """
        totals = {unit.name: unit.total for unit in space.units}
        if self.points[-1] != totals:
            other = _difference(self.points[-1], totals)
            advice = "give one of the same model and prune settings"
            raise InputError(f"strategy.file={self.file} is of other units: {other}; {advice}")
        # Each limit says how far towards the dense model we may go along the front; the tightest one decides.
        return min(self._place(limit, space) for limit in budget.limits)

    def _place(self, limit: Limit, space: Space) -> float:
        """The densest place on the front that keeps a limit."""
        costs = np.maximum.accumulate(_costs(self.points, space, limit).sum(1))
        if limit.target < costs[0] - 0.5:  # costs between levels are rounded
            raise InputError(
                f"the budget ({limit}) is sparser than the sparsest point of strategy.file={self.file}, which keeps "
                f"{costs[0] / limit.dense:.1%} of what can be pruned; ask for less, or search with strategy=pareto at "
                "this budget"
            )
        below = int(np.flatnonzero(costs <= limit.target + 0.5)[-1])
        if below == len(costs) - 1:
            return float(below)
        return below + max(0.0, float(limit.target - costs[below]) / float(costs[below + 1] - costs[below]))


def front_json(
    space: Space,
    front: Sequence[FrontPoint],
    budget: Budget,
    model: Mapping[str, str],
    dense_fitness: float | None = 0.0,
) -> dict[str, Any]:
    """The content of `front.json`: the points that a search found, and the dense model.

    Args:
        space: That was searched.
        front: Its points, from the sparsest on.
        budget: Of the run.
        model: Name and fingerprint.
        dense_fitness: Of the dense model: 0 for a divergence from it; None where it is not known.
    """
    limit = budget.first
    dense = FrontPoint(limit.dense, (0,) * len(space.units), dense_fitness)
    points = [
        {
            "target": point.target,
            "achieved": limit.cost(point.allocation),
            "fitness": point.fitness,
            "tokens": point.tokens,
            "kept": space.kept(point.allocation),
        }
        for point in (*front, dense)
    ]
    return {"format": FORMAT, "model": dict(model), "space": space.fingerprint, "kind": limit.kind, "points": points}


def read_front(file: str) -> list[Kept]:
    """What each point of a `front.json` keeps, in its order; InputError for a file that is none."""
    said, path = f"strategy.file={file}", Path(str(file)).expanduser()
    if not _is_file(path):
        raise InputError(f"{said} is not there; give the front.json of a run with strategy=pareto")
    try:
        content = read_json(path)
        if type(content["format"]) is int and content["format"] != FORMAT:
            raise InputError(f"{said} has format {content['format']}; this version reads format {FORMAT}")
        points: list[Kept] = [dict(point["kept"]) for point in verified(content)["points"]]
        dense = points[-1]
        if len(points) < 2 or not all(_fits(point, dense) for point in points):
            raise ValueError("its points are not of the same units, up to the dense model")
    except KeyError as error:
        raise InputError(f"{said} is damaged, or no front.json (there is no {error} in it)") from error
    except (UnreadableError, *WRONG) as error:
        raise InputError(f"{said} is damaged, or no front.json ({reason(error)})") from error
    return points


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _fits(point: Kept, dense: Kept) -> bool:
    """Whether a point is of the units of the dense one."""
    return point.keys() == dense.keys() and all(
        type(kept) is int and 0 <= kept <= dense[name] for name, kept in point.items()
    )


def _difference(there: Kept, here: Kept) -> str:
    """In what the units of a file differ from those of a space, at the first place."""
    for name in (*here, *there):
        if there.get(name) != here.get(name):
            ends = (f"{one[name]} members" if name in one else "no such unit" for one in (there, here))
            return "{}: {} there, {} here".format(name, *ends)
    return "none"


def _costs(points: Sequence[Kept], space: Space, limit: Limit) -> np.ndarray:
    """What a limit counts of each unit at each point, (points, units): in proportion between the levels of the
    space.
    """
    found = np.empty((len(points), len(space.units)))
    for index, (unit, costs) in enumerate(zip(space.units, limit.costs, strict=True)):
        # What keeps nothing costs nothing: below the lowest level of a window.
        kept = [0] * (unit.levels[-1].kept > 0) + [level.kept for level in reversed(unit.levels)]
        at = [0] * (unit.levels[-1].kept > 0) + list(reversed(costs))
        found[:, index] = np.interp([point[unit.name] for point in points], kept, at)
    return found
