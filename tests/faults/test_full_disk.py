"""A disk that fills up ends a run with one line, and the same command goes on once there is space again."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Runs, left_over, result

POINTS = 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size is set later."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def one_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.slow
def test_a_disk_of_twenty_sizes_that_grows_in_time(runs: Runs, undisturbed: tuple[Path, int], disk: Path) -> None:
    """The disk is as full as it gets at each size, and then the next one: a run that goes on twenty times ends like any
    other.
    """
    expected, _ = undisturbed
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in expected.rglob("*") if path.is_file()) + 64
    stopped = 0
    for point in range(1, POINTS):
        resize(disk, used * point // POINTS)
        ended = runs(disk)
        if ended.status == 0:
            break
        stopped += 1
        assert ended.status == 1 and one_line(ended.stderr) and "Traceback" not in ended.stdout, ended
        assert "No space left on device" in ended.stderr or "os error 28" in ended.stderr, ended
    assert stopped > POINTS // 2
    resize(disk, 65536)
    assert runs(disk, status=0).stderr == ""
    assert result(disk) == result(expected)
    assert left_over(disk / "run") == []


@pytest.mark.sampled(0)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_disk_that_refuses_from_some_write_on(
    share: float, runs: Runs, undisturbed: tuple[Path, int], tmp_path: Path
) -> None:
    """Where nothing can be mounted: a file that cannot be synchronised is none."""
    expected, changes = undisturbed
    ended = runs(tmp_path, ("full", int(share * changes)), status=1)
    assert one_line(ended.stderr) and "No space left on device; free some space" in ended.stderr
    runs(tmp_path, status=0)
    assert result(tmp_path) == result(expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, 60))
def test_a_disk_of_any_size(point: int, runs: Runs, undisturbed: tuple[Path, int], disk: Path) -> None:
    expected, _ = undisturbed
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in expected.rglob("*") if path.is_file()) + 64
    resize(disk, used * point // 60)
    ended = runs(disk)
    assert ended.status == 0 or (ended.status == 1 and one_line(ended.stderr)), ended
    resize(disk, 65536)
    runs(disk, status=0)
    assert result(disk) == result(expected)
