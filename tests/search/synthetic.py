"""Problems for strategies whose losses cost nothing, and a run of a strategy on them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from search.budgets.budget import Budget, Limit, costs_of
from search.budgets.knapsack import uniform
from search.strategies.base import HistoryRow, Problem, Strategy
from search.strategies.measuring import GRADIENT_COST
from search.strategies.state import State
from supernet.space import BITS, Allocation, Level, Space, Unit

SpaceOf = Callable[..., Space]
TRANSFORMER = [(1000, (8, 7, 6, 5, 4, 3, 2, 1, 0)), (30, (256, 224, 192, 160, 128, 96, 64, 32, 0))] * 4
D_OUT, D_IN, GROUP, DENSE_BITS = 64, 256, 128, 16
PER_GROUP = DENSE_BITS + 8  # a scale and a zero


@dataclass
class Synthetic:
    """An evaluator: each unit's loss grows with its sparsity, at a rate of its own.

    Attributes:
        space: Whose units have the losses.
        seed: Of the rates.
        noise: Standard deviation of what each sequence adds to each allocation.
        shift: Standard deviation of what each sequence adds to all allocations alike.
        error: Standard deviation of the error of first-order changes.
        overflows: The level of the first unit above which nothing is finite.
        falling: Rates fall evenly from the first unit to the last, to about a quarter, instead of being drawn at
            random.
        calls: What was measured: allocations, and sequences.
        gradients: Sequences that gradients were taken on.
    """

    space: Space
    seed: int = 0
    noise: float = 0.0
    shift: float = 0.0
    error: float = 0.0
    overflows: float = np.inf
    falling: bool = False
    sequences: int = 40
    sequence_length: int = 16
    calls: list[tuple[list[Allocation], list[int]]] = field(default_factory=list)
    gradients: list[list[int]] = field(default_factory=list)

    @property
    def losses(self) -> list[np.ndarray]:
        """Of each level of each unit; they add up."""
        count = len(self.space.units)
        drawn = np.random.default_rng(self.seed).lognormal(sigma=1.5, size=count)
        units = zip(self.space.units, 4.0 ** (-np.arange(count) / count) if self.falling else drawn, strict=True)
        return [np.array([rate * unit.sparsity(v) ** 2 for v in range(len(unit.levels))]) for unit, rate in units]

    @property
    def tokens(self) -> int:
        """Forward tokens spent."""
        passes = sum(len(allocations) * len(chosen) for allocations, chosen in self.calls)
        return (passes + GRADIENT_COST * sum(map(len, self.gradients))) * self.sequence_length

    def exact(self, allocation: Allocation) -> float:
        """Without noise."""
        return float(sum(loss[level] for loss, level in zip(self.losses, allocation, strict=True)))

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """See `Evaluator`."""
        assert len(set(chosen.tolist())) == len(chosen)
        self.calls.append((list(allocations), chosen.tolist()))
        shared = [self.shift * np.random.default_rng(int(c)).normal() for c in chosen]
        own = [[self.noise * np.random.default_rng([*a, int(c)]).normal() for c in chosen] for a in allocations]
        found = np.array([[self.exact(a)] for a in allocations]) + np.array(shared) + np.array(own)
        return np.where(np.array([[a[0] > self.overflows] for a in allocations]), np.inf, found)

    def effects(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        """See `Evaluator`; exact but for `error`."""
        self.gradients.append(chosen.tolist())
        rng = np.random.default_rng([*allocation, *chosen.tolist()])
        found = []
        for loss, level in zip(self.losses, allocation, strict=True):
            change = loss - loss[level] + self.error * rng.normal(size=len(loss))
            change[level] = 0.0
            found.append(change)
        return found if allocation[0] <= self.overflows else [np.full_like(change, np.nan) for change in found]


def budget_of(space: Space, target: int) -> Budget:
    """At most so many parameters."""
    return Budget((Limit("parameters", target, space.dense_cost, costs_of(space)),))


def bits_space(layers: int, widths: tuple[int, ...] = (8, 6, 4, 3, 2)) -> Space:
    """Linear layers of alternating sizes, dense or with a scale and a zero for every group of codes."""
    units = []
    for index in range(layers):
        d_out = D_OUT * (1 + index % 3)
        levels = [Level(DENSE_BITS, DENSE_BITS * d_out * D_IN)]
        levels += [Level(bits, d_out * (bits * D_IN + D_IN // GROUP * PER_GROUP)) for bits in widths]
        units.append(Unit(f"layer.{index}", BITS, DENSE_BITS, tuple(levels)))
    return Space(tuple(units))


def make_problem(space: Space, sparsity: float = 0.4, **evaluator: Any) -> Problem:
    """From the uniform allocation to the best one; the errors of a build are the losses but for the rates."""
    budget = Budget.from_sparsity(sparsity, space)
    errors = [[unit.sparsity(level) ** 2 for level in range(len(unit.levels))] for unit in space.units]
    return Problem(space, budget, uniform(space, budget), Synthetic(space, **evaluator), errors=errors)


def synthetic(problem: Problem) -> Synthetic:
    """The problem's evaluator."""
    assert isinstance(problem.evaluate, Synthetic)
    return problem.evaluate


def run(
    strategy: Strategy, problem: Problem, seed: int = 0, pause: Callable[[State], State] = lambda state: state
) -> tuple[list[State], list[HistoryRow]]:
    """The states behind every generation, and all rows; what lies between two generations goes through `pause`."""
    states, rows = [pause(strategy.begin(problem, seed))], []
    while states[-1].generation < strategy.generations and not states[-1].exhausted:
        state, more = strategy.advance(problem, states[-1])
        states.append(pause(state))
        rows += more
    return states, rows


def through_json(state: State) -> State:
    """As a checkpoint keeps it."""
    return type(state).from_json(json.loads(json.dumps(state.to_json())))


def as_json(states: Sequence[State]) -> list[str]:
    """States as a checkpoint keeps them."""
    return [json.dumps(state.to_json()) for state in states]


def without_seconds(rows: Sequence[HistoryRow]) -> list[dict[str, Any]]:
    """What must be the same in two runs."""
    return [asdict(row) | {"seconds": 0.0} for row in rows]


def last_step(rows: Sequence[HistoryRow], generation: int) -> list[HistoryRow]:
    """The rows of a generation's last selection step."""
    own = [row for row in rows if row.generation == generation]
    return [row for row in own if row.step == own[-1].step]
