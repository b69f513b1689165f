"""What `fresh=true` does to the run that is there: it moves aside in one step, whole, and is never lost."""

import itertools
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from search.run.directory import locked
from supernet.errors import InputError
from tests.search.run.small import RESULTS, SPACE, advance, opened, state


def test_fresh_moves_each_run_aside(run: Path) -> None:
    advance(opened(run, fresh=True, seed=1), 0, 2.0)
    assert opened(run, seed=1).history().fitness.tolist() == [2.0]
    advance(opened(run, fresh=True, seed=2), 0, 3.0)
    found = {path.name: pd.read_parquet(path / "history.parquet").fitness.tolist() for path in run.parent.iterdir()}
    assert found == {"run": [3.0], "run.old-1": [1.0], "run.old-2": [2.0]}
    assert opened(run.with_name("run.old-1")).load_state(0, SPACE, 9) == state(1)


def test_fresh_moves_all_results_and_leaves_the_rest(run: Path) -> None:
    (run / "export").mkdir()
    (run / "export/model").touch()
    for name in ("allocation.json", "metrics.json", "search.log"):
        (run / name).touch()
    opened(run, fresh=True)
    assert {path.name for path in run.iterdir()} == {"search.log"}
    moved = {path.name for path in run.with_name("run.old-1").iterdir()}
    assert moved == {"export", "allocation.json", "metrics.json", "history.parquet", "checkpoint"}


def test_fresh_has_nothing_to_move_in_a_new_directory(tmp_path: Path) -> None:
    opened(tmp_path / "new", fresh=True)
    assert list(tmp_path.iterdir()) == []


NAMES = ("history.parquet", *RESULTS, "checkpoint")


def with_results(run: Path) -> dict[str, str]:
    """What there is of a finished run, by name and content."""
    (run / "export").mkdir()
    (run / "export/model").write_text("weights")
    for name in ("allocation.json", "front.json", "metrics.json", "search.log"):
        (run / name).write_text(name)
    return contents(run)


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text("latin1") for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("killed", range(8))
@pytest.mark.parametrize("again", [True, False], ids=["fresh", "not fresh"])
def test_fresh_is_one_step_wherever_it_is_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch, killed: int, again: bool
) -> None:
    before = with_results(run)
    calls = itertools.count()
    rename = Path.rename

    def or_dies(path: Path, target: Path) -> Path:
        if next(calls) == killed:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", or_dies)
        with locked(run, RESULTS):
            opened(run, fresh=True)
    with locked(run, RESULTS):
        directory = opened(run, fresh=again)
        if killed == 0 and not again:  # it had not begun: the old run goes on
            assert contents(run) == before | {".lock": ""}
            return
        assert directory.load_state(0, SPACE, 9) is None and directory.history().empty
        advance(directory, 0, 2.0)
    old = run.with_name("run.old-1")
    assert {path.name for path in run.parent.iterdir()} == {"run", "run.old-1"}
    assert contents(old) == {name: text for name, text in before.items() if name != "search.log"}
    assert opened(old).load_state(0, SPACE, 9) == state(1)
    assert opened(run).history().fitness.tolist() == [2.0]


@pytest.mark.parametrize("name", [*NAMES, ".aside"])
def test_where_one_thing_cannot_be_moved_nothing_is(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = with_results(run)
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path == run / name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(InputError) as refusal:
        opened(run, fresh=True)
    assert str(refusal.value).startswith(
        f"cannot move {run / name} aside: Permission denied; {run} is left as it was: "
    )
    assert contents(run) == before and [path.name for path in run.parent.iterdir()] == ["run"]
    assert opened(run).load_state(0, SPACE, 9) == state(1)


def test_a_fresh_run_that_was_killed_goes_on(run: Path) -> None:
    """And does not start over each time, leaving .old-2, .old-3 and so on."""
    for generation in range(3):
        with locked(run, RESULTS):
            directory = opened(run, fresh=True, seed=1)
            found = directory.load_state(0, SPACE, 9)
            assert (found.generation if found else 0) == generation
            advance(directory, generation, 0.5)
    assert {path.name for path in run.parent.iterdir()} == {"run", "run.old-1"}
    opened(run, fresh=True, seed=2)  # other settings are another run
    assert (run.parent / "run.old-2/history.parquet").exists()


@pytest.mark.parametrize(
    "file", ["checkpoint/round-0.json", "checkpoint/costs.json", "history.parquet", "checkpoint/fresh.json"]
)
def test_a_fresh_run_that_is_damaged_starts_over(run: Path, file: str) -> None:
    advance(opened(run, fresh=True), 0, 0.5)
    (run / file).write_text("{")
    assert opened(run, fresh=True).load_state(0, SPACE, 9) is None
    assert (run.parent / "run.old-2").exists()


def test_a_finished_fresh_run_starts_over(run: Path) -> None:
    directory = opened(run, fresh=True)
    advance(directory, 0, 0.5)
    directory.finish()
    assert opened(run, fresh=True).load_state(0, SPACE, 9) is None


def test_fresh_helps_where_the_text_is_another(run: Path) -> None:
    directory = opened(run, fresh=True)
    directory.identify({"model": "a1"})
    advance(directory, 0, 0.5)
    directory = opened(run, fresh=True)
    directory.identify({"model": "b"})
    assert directory.load_state(0, SPACE, 9) is None and (run.parent / "run.old-2/history.parquet").exists()
