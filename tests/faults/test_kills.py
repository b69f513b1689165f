"""A run that is killed at any moment ends, given the same command again, as if nothing had happened."""

import signal
from pathlib import Path

import pytest

from tests.faults.runs import Runs, left_over, result

SAMPLED = 12


def check(runs: Runs, folder: Path, expected: Path, point: int) -> None:
    folder.mkdir()
    runs(folder, ("kill", point), status=-signal.SIGKILL)
    ended = runs(folder, status=0)
    assert ended.stderr == ""
    assert result(folder) == result(expected), f"killed at {point}"
    assert left_over(folder / "run") == []


@pytest.mark.sampled(0)
@pytest.mark.parametrize("share", [0.7, *(point / SAMPLED for point in range(SAMPLED)), 0.93, 0.97])
def test_at_some_lasting_changes(share: float, runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    """Before and behind changes that are spread over the whole run; the last are those of the export."""
    expected, changes = undisturbed
    assert changes > 20
    check(runs, tmp_path / "killed", expected, int(share * 2 * changes))


@pytest.mark.slow
def test_at_all_lasting_changes(runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    expected, changes = undisturbed
    for point in range(2 * changes):
        check(runs, tmp_path / str(point), expected, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [1, 6])
def test_while_a_run_is_moved_aside(point: int, runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    """A run that fresh=true began goes on, too, and the one before it stays whole beside it."""
    expected, _ = undisturbed
    runs(tmp_path, status=0)
    runs(tmp_path, ("kill", point), arguments=["fresh=true"], status=-signal.SIGKILL)
    runs(tmp_path, arguments=["fresh=true"], status=0)
    assert result(tmp_path) == result(expected)
    (aside,) = tmp_path.glob("run.old-*")
    (tmp_path / "before").mkdir()
    aside.rename(tmp_path / "before/run")
    assert result(tmp_path / "before") == result(expected)
