"""What every tracker keeps to. A new one is added to TRACKERS, with how what it shows is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.trackers.base import Tracker
from search.trackers.optuna import OptunaTracker
from supernet.space import Level, Space, Unit

SPACE = Space((Unit("0.mlp", "mlp", 8, (Level(8, 80), Level(6, 60), Level(4, 40))),))
METRICS: Mapping[str, Any] = {"searched": {"perplexity": 12.5}}


def shown_by_optuna(folder: Path) -> list[float]:
    storage = JournalStorage(JournalFileBackend(str(folder / "trials.log")))
    return [float(trial.values[0]) for trial in optuna.load_study(study_name=folder.name, storage=storage).trials]


Made = tuple[Callable[[], Tracker], Callable[[], list[float]]]  # begins one; what the run's shows
TRACKERS: dict[str, tuple[Callable[[], Tracker], Callable[[Path], list[float]]]] = {
    "optuna": (OptunaTracker, shown_by_optuna),
}


def history(*fitness: float) -> pd.DataFrame:
    """A row for each value, a generation each."""
    rows = [
        {"iteration": 0, "generation": generation, "step": 0, "tokens": 64, "fitness": value, "survived": True}
        | {"seconds": 0.5, "allocation": str(generation % 3)}
        for generation, value in enumerate(fitness)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(params=TRACKERS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Makes a tracker that has begun, as a process does; and what it shows of the run, the fitness of each row."""
    make, shown = TRACKERS[request.param]

    def begun() -> Tracker:
        tracker = make()
        tracker.begin(tmp_path / "run", "identifier")
        return tracker

    return begun, lambda: shown(tmp_path / "run")


class TestContract:
    def test_it_shows_the_rows_once(self, made: Made) -> None:
        tracker = made[0]()
        for _ in range(2):
            tracker.generation(history(3.0, 2.0), 0, SPACE)
        tracker.generation(history(3.0, 2.0, 1.0), 0, SPACE)
        tracker.metrics(METRICS)
        tracker.end()
        assert made[1]() == [3.0, 2.0, 1.0]

    def test_it_goes_on_in_the_next_process(self, made: Made) -> None:
        made[0]().generation(history(3.0), 0, SPACE)  # killed: no end
        again = made[0]()
        again.generation(history(3.0, 2.0), 0, SPACE)
        again.metrics(METRICS)
        again.metrics(METRICS)
        again.end()
        assert made[1]() == [3.0, 2.0]

    def test_a_finished_run_can_be_given_one(self, made: Made) -> None:
        tracker = made[0]()
        tracker.generation(history(3.0, 2.0, 1.0), 0, SPACE)
        tracker.end()
        assert made[1]() == [3.0, 2.0, 1.0]
