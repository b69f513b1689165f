"""A run's trials in an Optuna study: those of the history, once, whatever happens in between."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from search.run.directory import RunDirectory
from search.strategies.base import HistoryRow
from search.strategies.state import State
from search.trackers.optuna import OptunaTracker
from supernet.errors import InputError
from supernet.space import Level, Space, Unit

COARSE = (Level(8, 80), Level(6, 60), Level(4, 40))
FINE = (Level(8, 80), Level(7, 70), Level(6, 60))
SPACES = [
    Space((Unit("0.attention", "attention", 8, levels), Unit("0.mlp", "mlp", 8, levels))) for levels in (COARSE, FINE)
]
RNG: dict[str, Any] = np.random.PCG64(7).state  # type: ignore[assignment]
FILES = ["trials.log", "sqlite:///trials.db"]


def opened(path: Path, fresh: bool = False) -> RunDirectory:
    return RunDirectory(path, {"seed": 0}, fresh)


def advance(directory: RunDirectory, iteration: int, generation: int, *fitness: float) -> None:
    """A generation with rows of these values, all but the first of the allocation (1, 2)."""
    rows = [
        HistoryRow(generation, i, 64, value, i == 0, 0.5, (1, 2) if i else (0, 1)) for i, value in enumerate(fitness)
    ]
    directory.save_state(iteration, SPACES[iteration], State((1, 2), 0.25, generation + 1, 1000, RNG), rows)


def tracker(study: str, directory: RunDirectory) -> OptunaTracker:
    """One that has begun."""
    begun = OptunaTracker(study)
    begun.begin(directory.path, directory.identifier())
    return begun


def follow(trials: OptunaTracker, directory: RunDirectory, iteration: int = 0) -> None:
    trials.generation(directory.history(), iteration, SPACES[iteration])


def storage(folder: Path) -> BaseStorage:
    """As optuna-dashboard opens what lies in a run's directory."""
    if (folder / "trials.db").exists():
        return RDBStorage(f"sqlite:///{folder / 'trials.db'}")
    return JournalStorage(JournalFileBackend(str(folder / "trials.log")))


def values(folder: Path, name: str = "run") -> list[float | None]:
    return [trial.value for trial in optuna.load_study(study_name=name, storage=storage(folder)).trials]


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> str:
    """A setting of `study`."""
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_rows_become_trials(folder: Path, file: str) -> None:
    directory = opened(folder)
    trials = tracker(file, directory)
    advance(directory, 0, 0, 3.0, 2.0)
    follow(trials, directory)
    advance(directory, 1, 0, float("nan"), 1.0)
    follow(trials, directory, 1)
    study = optuna.load_study(study_name="run", storage=storage(folder))
    assert optuna.get_all_study_names(storage(folder)) == ["run"]
    assert [trial.value for trial in study.trials] == [3.0, 2.0, None, 1.0]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2 + [TrialState.FAIL, TrialState.COMPLETE]
    assert study.best_trial.number == 3
    params = [
        {"0.attention": attention, "0.mlp": mlp}
        for attention, mlp in [(0, 0.25), (0.25, 0.5), (0, 0.125), (0.125, 0.25)]
    ]
    assert [trial.params for trial in study.trials] == params
    attrs = {"iteration": 0, "generation": 0, "step": 0, "tokens": 64, "survived": True}
    assert study.trials[0].user_attrs == attrs
    assert study.trials[3].user_attrs == attrs | {"iteration": 1, "step": 1, "survived": False}


def test_nothing_is_added_twice(folder: Path, file: str) -> None:
    directory = opened(folder)
    trials = tracker(file, directory)
    for generation in range(3):
        advance(directory, 0, generation, 3.0 - generation, 4.0)
        follow(trials, directory)
        follow(trials, directory)
    resumed = opened(folder)
    again = tracker(file, resumed)
    follow(again, resumed)
    assert values(folder) == [3.0, 4.0, 2.0, 4.0, 1.0, 4.0]
    advance(resumed, 0, 2, 1.0, 4.0)  # done again
    follow(again, resumed)
    assert values(folder) == [3.0, 4.0, 2.0, 4.0, 1.0, 4.0]


def test_what_a_killed_run_did_not_add_is_added_by_the_next(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened(folder)
    trials = tracker(file, directory)
    advance(directory, 0, 0, 3.0)
    follow(trials, directory)
    advance(directory, 0, 1, 2.0, 2.5, 2.75)
    added = optuna.Study.add_trial

    def killed(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        added(study, trial)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "add_trial", killed)
        follow(trials, directory)
    assert values(folder) == [3.0, 2.0]
    follow(tracker(file, opened(folder)), opened(folder))
    assert values(folder) == [3.0, 2.0, 2.5, 2.75]


def test_a_run_can_be_given_a_study_afterwards(folder: Path, file: str) -> None:
    directory = opened(folder)
    advance(directory, 0, 0, 3.0, 2.0)
    advance(directory, 1, 0, 1.0)
    trials = tracker(file, directory)
    for iteration in range(2):
        follow(trials, directory, iteration)
    assert values(folder) == [3.0, 2.0, 1.0]


def test_runs_of_one_name_have_studies_of_their_own(tmp_path: Path, file: str) -> None:
    shared = f"sqlite:///{tmp_path / 'trials.db'}" if "sqlite" in file else str(tmp_path / "trials.log")
    for fitness, parent in [(1.0, "a"), (2.0, "b"), (1.0, "a")]:
        directory = opened(tmp_path / parent / "run")
        trials = tracker(shared, directory)
        if not len(directory.history()):
            advance(directory, 0, 0, fitness)
        follow(trials, directory)
    fresh = opened(tmp_path / "a/run", fresh=True)
    trials = tracker(shared, fresh)
    advance(fresh, 0, 0, 3.0)
    follow(trials, fresh)
    assert [values(tmp_path, name) for name in ("run", "run-2", "run-3")] == [[1.0], [2.0], [3.0]]


def test_a_search_goes_on_without_its_study(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = opened(folder)
    trials = tracker(file, directory)
    advance(directory, 0, 0, 3.0, 2.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(optuna.Study, "add_trial", full)
        follow(trials, directory)
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"tracker.optuna.study={file}: trials cannot be added now ([Errno 28] No space left on device)"
    )
    advance(directory, 1, 0, 1.0)
    follow(trials, directory, 1)
    assert values(folder) == [3.0, 2.0, 1.0]
    optuna.delete_study(study_name="run", storage=storage(folder))
    advance(directory, 1, 1, 0.5)
    follow(trials, directory, 1)
    assert "trials cannot be added now" in caplog.records[-1].getMessage() and len(caplog.records) == 2


@pytest.mark.parametrize(
    ("study", "told"),
    [
        ("trials.db", "without sqlite:/// it would not be a database"),
        ("nowhere/trials.log", "No such file or directory"),
        (".", "it is no regular file"),
        ("text.log", "tracker.optuna.study=text.log cannot be opened"),
        ("sqlite:///text.log", "file is not a database"),
        ("sqlite:///nowhere/trials.db", "unable to open database file"),
        ("sqlite://", "it names no file"),
        ("sqlite:///:memory:", "it names no file"),
        ("nonsense://trials", "Can't load plugin: sqlalchemy.dialects:nonsense"),
        ("://", "Could not parse"),
        ("postgresql://user:secret@localhost:1/trials", "tracker.optuna.study=postgresql://user:***@localhost"),
        ("redis://localhost:1", "redis"),
    ],
)
def test_a_bad_storage_is_refused(folder: Path, study: str, told: str) -> None:
    (folder / "text.log").write_text("This is neither a journal nor a database.\n" * 10)
    with pytest.raises(InputError) as refusal:
        tracker(study, opened(folder))
    message = str(refusal.value)
    assert (
        message.startswith(f"tracker.optuna.study={study.replace('secret', '***')} cannot be opened (")
        and told in message
    )
    assert "use a journal file such as trials.log, or a database such as sqlite:///trials.db" in message
    assert "\n" not in message and "secret" not in message
    assert {path.name for path in folder.iterdir()} <= {"text.log", "checkpoint"}


class TestCommandLine:
    def test_a_finished_run_is_given_a_study(self, copy: Path, call: Callable[..., CompletedProcess[str]]) -> None:
        process = call("+experiment=smoke", "tracker=optuna", "tracker.optuna.study=sqlite:///trials.db")
        assert (process.returncode, process.stderr) == (0, "")
        folder = copy / "outputs/search/smoke"
        history = pd.read_parquet(folder / "history.parquet")
        assert values(folder, "smoke") == history["fitness"].tolist()
        assert set(history["iteration"]) == {0, 1}

    @pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
    def test_a_search_by_optuna(self, copy: Path, call: Callable[..., CompletedProcess[str]], sampler: str) -> None:
        """Everything but the search is there already."""
        smoke = (
            "model=tiny_llama data=pydoc prune.multiple=8 supernet.levels=5 supernet.step=0.25 dtype=float32 "
            "data.sequence_length=64"
        )
        size = (
            "data.sequences.calibration=16 data.sequences.search=16 data.sequences.evaluation=8 rounds=1 "
            "stages=[build,search]"
        )
        search = (
            f"strategy=optuna strategy.sampler={sampler} strategy.generations=2 strategy.offspring=4 "
            "strategy.tokens=128"
        )
        process = call(*smoke.split(), *size.split(), *search.split(), "tracker=optuna", "hydra.run.dir=optuna")
        assert (process.returncode, process.stderr) == (0, "")
        folder = copy / "optuna"
        history = pd.read_parquet(folder / "history.parquet")
        assert values(folder, "optuna") == history["fitness"].tolist()
        assert json.loads((folder / "allocation.json").read_text())["units"]

    @pytest.mark.parametrize(
        ("study", "told"),
        [
            ("sqlite:///no/trials.db", "unable to open"),
            ("5", "must be a journal file"),
            ("''", "must be a journal file"),
            ("t.db", "sqlite:///"),
        ],
    )
    def test_a_bad_study_is_refused_before_the_work(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: Callable[..., CompletedProcess[str]],
        refusal: Callable[[CompletedProcess[str]], str],
        study: str,
        told: str,
    ) -> None:
        monkeypatch.setenv("SPARSITY_SEARCH_CACHE", str(tmp_path / "cache"))
        assert told in refusal(call("+experiment=smoke", "tracker=optuna", f"tracker.optuna.study={study}"))
        assert not list(tmp_path.rglob("supernets/*"))


class TestJournalsThatAKillOrAFullDiskCutOff:
    @pytest.mark.parametrize("cut", [1, 20, 100, 300])
    def test_the_next_run_goes_on(self, folder: Path, cut: int) -> None:
        directory = opened(folder)
        advance(directory, 0, 0, 2.0, 1.0)
        follow(tracker("trials.log", directory), directory)
        journal = folder / "trials.log"
        journal.write_bytes(journal.read_bytes()[:-cut])
        advance(directory, 0, 1, 3.0)
        for _ in range(2):
            follow(tracker("trials.log", directory), directory)
        assert values(folder) == [2.0, 1.0, 3.0]

    @pytest.mark.parametrize("rest", [2, 3], ids=["in the middle", "in the last line, which has an end"])
    def test_one_with_a_torn_line_is_written_anew(
        self, folder: Path, caplog: pytest.LogCaptureFixture, rest: int
    ) -> None:
        directory = opened(folder)
        advance(directory, 0, 0, 2.0, 1.0)
        follow(tracker("trials.log", directory), directory)
        journal = folder / "trials.log"
        lines = journal.read_bytes().splitlines(keepends=True)
        torn = b"".join([*lines[:2], lines[2][:30], *lines[rest:]])
        journal.write_bytes(torn)
        follow(tracker("trials.log", directory), directory)
        assert values(folder) == [2.0, 1.0]
        assert (folder / "trials.log.damaged-1").read_bytes() == torn
        assert "trials.log.damaged-1 now, and written anew" in caplog.text

    def test_a_file_that_is_no_journal_stays(self, folder: Path) -> None:
        for notes in ("my notes\nand more", '{"json": 1}\n', "no"):
            (folder / "trials.log").write_text(notes)
            with pytest.raises(InputError, match="tracker.optuna.study=trials.log cannot be opened .it is no journal"):
                tracker("trials.log", opened(folder))
            assert (folder / "trials.log").read_text() == notes

    def test_a_dead_process_s_lock_is_not_waited_for(self, folder: Path) -> None:
        directory = opened(folder)
        follow(tracker("trials.log", directory), directory)
        (folder / "trials.log.lock").symlink_to(folder / "trials.log")
        begun = time.monotonic()
        tracker("trials.log", directory)
        assert time.monotonic() - begun < 10  # Optuna waits for 30 seconds

    @pytest.mark.parametrize("study", ["/dev/full", "/dev/zero", "fifo", "folder"])
    def test_what_is_no_regular_file_is_refused(self, folder: Path, study: str) -> None:
        os.mkfifo(folder / "fifo")
        (folder / "folder").mkdir()
        with pytest.raises(InputError, match="it is no regular file"):
            tracker(study, opened(folder))

    def test_a_study_that_nobody_claimed_is_taken(self, folder: Path) -> None:
        optuna.create_study(storage=storage(folder), study_name=folder.name)
        directory = opened(folder)
        advance(directory, 0, 0, 2.0)
        follow(tracker("trials.log", directory), directory)
        assert values(folder) == [2.0]
