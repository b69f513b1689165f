"""Takes an allocation for any budget from the front of an earlier run (`search.strategies.guided.pareto`).

Between two points of the front, each unit keeps what lies between the two allocations, in proportion to cost. The
earlier run has not measured what comes of that. So it is measured, and so are the allocations of the two points,
repaired to the budget, and the allocation that the round starts at; the best one is taken. `front.json`, the file that
holds a front, is written and read here, too.
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
CANDIDATES = 4  # measured at most: the one in between, those of the two points, the start

Kept = Mapping[str, int]  # how many members a unit keeps, by its name


@dataclass(frozen=True)
class Front(Rule):
    """The rule that takes its allocation from a front.

    Attributes:
        file: The path of the `front.json` that the earlier run wrote.
        tokens: How many tokens of the search text an allocation between two points is measured on, beside its rivals; 0
            takes it unmeasured.
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
        """Return whether allocations between two points of the front are measured."""
        return self.tokens > 0

    @property
    def tokens_per_generation(self) -> int:
        """Count one measurement of each allocation that may be compared."""
        return CANDIDATES * self.tokens

    def check_rounds(self, rounds: int) -> None:
        """Advise against more than one round, as a further one costs a build and gains little."""
        if rounds != 1:
            log.warning(
                "rounds=%d with strategy=front: every round is built, for levels a little nearer to the front; "
                "rounds=1 will do",
                rounds,
            )

    def check_budget(self, space: Space, budget: Budget) -> None:
        """Refuse a front of other units, and a budget that is sparser than all of the front."""
        self.position(space, budget)

    @cached_property
    def points(self) -> list[Kept]:
        """What each point of the front keeps, from the sparsest point to the dense model."""
        return read_front(self.file)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Take the allocation on the front at this budget; between two points, measure it and its rivals first."""
        if only_allocation(problem) is not None:
            return super().advance(problem, state)
        position = self.position(problem.space, problem.budget)
        wished, below = towards(problem, self._sparsities(position, problem)), int(position)
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

    def _sparsities(self, position: float, problem: Problem) -> np.ndarray:
        """Return the sparsity that each unit has at a position on the front, (units,), as the leading limit counts."""
        costs = _costs(self.points, problem.space, problem.budget.leading)  # (points, units)
        below = min(int(position), len(costs) - 2)
        wish = costs[below] + (position - below) * (costs[below + 1] - costs[below])
        return np.asarray(1.0 - wish / np.maximum(1, costs[-1]))

    def position(self, space: Space, budget: Budget) -> float:
        """Return how far along the front a budget goes: 1.5 is half way from point 1 to point 2, counted from 0.

        An InputError says if the front is of other units, or if the budget is sparser than all of it.
        """
        totals = {unit.name: unit.total for unit in space.units}
        if self.points[-1] != totals:
            other = _difference(self.points[-1], totals)
            advice = "give one of the same model and prune settings"
            raise InputError(f"strategy.file={self.file} is of other units: {other}; {advice}")
        # Each limit says how far towards the dense model we may go along the front; the tightest one decides.
        return min(self._position_at(limit, space) for limit in budget.limits)

    def _position_at(self, limit: Limit, space: Space) -> float:
        """Return the densest position on the front that keeps within a limit."""
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
    """Return the content of `front.json`: the points that a search found, and the dense model as the last one.

    Args:
        space: The space that was searched.
        front: The points that were found, from the sparsest on.
        budget: The budget of the run.
        model: The name and the fingerprint of the model.
        dense_fitness: The fitness of the dense model: 0 if fitness is a divergence from it, None if it is not known.
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
    """Read what each point of a `front.json` keeps, in its order, or raise an InputError if it is no such file."""
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
    """Return whether a point has the units of the dense model, and keeps no more of them than there is."""
    return point.keys() == dense.keys() and all(
        type(kept) is int and 0 <= kept <= dense[name] for name, kept in point.items()
    )


def _difference(there: Kept, here: Kept) -> str:
    """Say in words what the first difference is between the units of a file and those of a space."""
    for name in (*here, *there):
        if there.get(name) != here.get(name):
            ends = (f"{one[name]} members" if name in one else "no such unit" for one in (there, here))
            return "{}: {} there, {} here".format(name, *ends)
    return "none"


def _costs(points: Sequence[Kept], space: Space, limit: Limit) -> np.ndarray:
    """Return what each unit costs at each point of a front, as a limit counts, (points, units).

    Between two levels of the space, costs are interpolated by the number of members kept.
    """
    found = np.empty((len(points), len(space.units)))
    for index, (unit, costs) in enumerate(zip(space.units, limit.costs, strict=True)):
        # Below the last level of the space, costs fall to 0 for what keeps nothing.
        kept = [0] * (unit.levels[-1].kept > 0) + [level.kept for level in reversed(unit.levels)]
        at = [0] * (unit.levels[-1].kept > 0) + list(reversed(costs))
        found[:, index] = np.interp([point[unit.name] for point in points], kept, at)
    return found
