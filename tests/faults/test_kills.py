"""A run that is killed at any moment ends, given the same command again, as if nothing had happened."""

import signal
from pathlib import Path

import pytest

from tests.faults.runs import Runs, left_over, result

SAMPLED = 8


def check(runs: Runs, folder: Path, expected: Path, point: int) -> None:
    folder.mkdir()
    runs(folder, ("kill", point), status=-signal.SIGKILL)
    ended = runs(folder, status=0)
    assert ended.stderr == ""
    assert result(folder) == result(expected), f"killed at {point}"
    assert left_over(folder / "run") == []


def test_at_some_lasting_changes(runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    """Before and behind changes that are spread over the whole run."""
    expected, changes = undisturbed
    assert changes > 20
    for point in range(0, 2 * changes, -(-2 * changes // SAMPLED) | 1):  # an odd step: before some, behind others
        check(runs, tmp_path / str(point), expected, point)
    for point in range(2 * changes - 16, 2 * changes, 5):  # the export's last steps, and what is noted of it
        check(runs, tmp_path / str(point), expected, point)


@pytest.mark.slow
def test_at_all_lasting_changes(runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    expected, changes = undisturbed
    for point in range(2 * changes):
        check(runs, tmp_path / str(point), expected, point)


def test_while_a_run_is_moved_aside(runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    """A run that fresh=true began goes on, too, and the one before it stays whole beside it."""
    expected, _ = undisturbed
    for point in (1, 6):
        folder = tmp_path / str(point)
        folder.mkdir()
        runs(folder, status=0)
        runs(folder, ("kill", point), arguments=["fresh=true"], status=-signal.SIGKILL)
        runs(folder, arguments=["fresh=true"], status=0)
        assert result(folder) == result(expected)
        (aside,) = folder.glob("run.old-*")
        (folder / "before").mkdir()
        aside.rename(folder / "before/run")
        assert result(folder / "before") == result(expected)
