"""A run directory that nothing but its own functions have written: two units, and generations of one row each."""

from pathlib import Path
from typing import Any

import numpy as np

from search.run.directory import RunDirectory
from search.strategies.base import HistoryRow
from search.strategies.state import State
from supernet.space import Level, Space, Unit

LEVELS = (Level(4, 8), Level(2, 4), Level(1, 2))
SPACE = Space(tuple(Unit(f"unit.{index}", "mlp", 4, LEVELS) for index in range(2)))
RNG: dict[str, Any] = np.random.PCG64(7).state  # type: ignore[assignment]
RESULTS = ("allocation.json", "front.json", "metrics.json", "export")
SETTINGS = {"seed": 0, "budget": {"sparsity": 0.5}, "strategy": {"tokens": [64, 256]}}


def opened(path: Path, fresh: bool = False, **settings: Any) -> RunDirectory:
    return RunDirectory(path, SETTINGS | settings, fresh, RESULTS)


def state(generation: int, parent: tuple[int, ...] = (1, 2)) -> State:
    return State(parent, 0.25, generation, 1000, RNG)


def row(generation: int, fitness: float, step: int = 0) -> HistoryRow:
    return HistoryRow(generation, step, 64, fitness, True, 0.5, (1, 2))


def advance(directory: RunDirectory, generation: int, fitness: float, iteration: int = 0) -> None:
    """A generation whose one row has this fitness."""
    directory.save_state(iteration, SPACE, state(generation + 1), [row(generation, fitness)])
