"""Real processes and real file systems: readers beside a writer, writers that die, disks that fill up or cannot be
written.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pytest

from supernet.__main__ import main
from supernet.errors import InputError
from supernet.store import Supernet
from supernet.system.atomic import ABANDONED, _this_machine, left_behind, write_atomic

# A supernet of six units of 100 kB, whose candidates are known without being kept.
COMMON = """
import itertools, os, signal, sys, time
from pathlib import Path
import torch
from supernet.candidates import Members
from supernet.errors import InputError
from supernet.space import Level, Space, Unit
from supernet.store import Supernet

UNITS, LEVELS = 6, (64, 48, 16)
space = Space(tuple(Unit(f"unit.{i}", "mlp", 64, tuple(Level(k, k) for k in LEVELS)) for i in range(UNITS)))

def weight(unit, level):
    return torch.full((400, LEVELS[level]), float(10 * unit + level))

def candidates(unit):
    return [Members(torch.arange(LEVELS[level]), weight(unit, level)) for level in (1, 2)]

def opened(root):
    return Supernet.open_or_create(Path(root), space, {})
"""
WRITER = """
supernet, waiting = opened(sys.argv[1]), Path(sys.argv[2])
with supernet.building():
    while len(list(waiting.iterdir())) < 2:
        time.sleep(0.01)
    for unit in range(UNITS):
        time.sleep(0.03)
        supernet.write(f"unit.{unit}", candidates(unit), {})
"""
# Asks for every unit until it is there; says how often it was not.
READER = """
supernet, missing, deadline = opened(sys.argv[1]), 0, time.monotonic() + 60
for unit, level in itertools.product(range(UNITS), (1, 2)):
    while True:
        assert time.monotonic() < deadline
        try:
            found = supernet.candidate(unit, level).weight
        except InputError as error:
            assert "its build is not finished" in str(error), error
            missing += 1
            (Path(sys.argv[2]) / str(os.getpid())).touch()
            time.sleep(0.01)
        else:
            break
    assert torch.equal(found, weight(unit, level)), (unit, level)
    supernet.release()
print(missing)
"""
# Is killed when it is about to do something to a file for the n-th time.
VICTIM = """
supernet, function, last = opened(sys.argv[1]), sys.argv[2], int(sys.argv[3])
works, calls = getattr(os, function), itertools.count(1)

def or_dies(*arguments):
    if next(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return works(*arguments)

setattr(os, function, or_dies)
with supernet.building():
    for unit in range(UNITS):
        supernet.write(f"unit.{unit}", candidates(unit), {})
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def common() -> dict[str, Any]:
    """The names of `COMMON` in this process."""
    names: dict[str, Any] = {}
    exec(COMMON, names)
    return names


def assert_whole(common: dict[str, Any], supernet: Supernet, units: int) -> None:
    """The first units are there, and no others."""
    for unit in range(common["UNITS"]):
        assert supernet.has(f"unit.{unit}") == (unit < units)
        for level in (1, 2) if unit < units else ():
            assert (supernet.candidate(unit, level).weight == common["weight"](unit, level)).all()


@pytest.mark.slow
def test_two_processes_read_while_one_writes(tmp_path: Path, common: dict[str, Any]) -> None:
    (waiting := tmp_path / "waiting").mkdir()
    processes = [start(script, tmp_path, waiting) for script in (READER, READER, WRITER)]
    results = [(process.communicate(timeout=90), process.returncode) for process in processes]
    assert [(errors, status) for (_, errors), status in results] == [("", 0)] * 3
    assert all(int(output) > 0 for (output, _), _ in results[:2])  # both read while the supernet was unfinished
    assert_whole(common, common["opened"](tmp_path), 6)


@pytest.mark.sampled(0)
@pytest.mark.parametrize(
    ("function", "call", "whole", "left"),
    [
        pytest.param("fsync", 5, 1, 1, id="a unit's file not yet on disk"),
        pytest.param("replace", 4, 1, 1, id="a unit's file whole, but not named yet"),
        pytest.param("fsync", 9, 2, 1, id="the third unit"),
    ],
)
def test_a_killed_writer_leaves_no_lock_and_no_half_unit(
    tmp_path: Path,
    common: dict[str, Any],
    function: str,
    call: int,
    whole: int,
    left: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = start(VICTIM, tmp_path, function, call)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGKILL
    supernet = common["opened"](tmp_path)
    assert_whole(common, supernet, whole)
    with pytest.raises(InputError, match="its build is not finished"):
        supernet.candidate(whole, 1)
    with filelock.FileLock(supernet.path / ".lock", timeout=0):
        pass
    stale = [file for folder in (supernet.path, supernet.path / "units") for file in left_behind(folder)]
    assert len(stale) == left
    with supernet.building():
        for unit in range(whole, 6):
            supernet.write(f"unit.{unit}", common["candidates"](unit), {})
    assert_whole(common, common["opened"](tmp_path), 6)
    (tmp_path / "run.json").write_text(supernet.fingerprint)
    supernet.note_use(tmp_path / "run.json")
    main(["gc", str(tmp_path)])
    assert f"removed temporary files of killed processes in {supernet.path.name} (" in capsys.readouterr().out
    assert not any(file.exists() for file in stale)
    assert_whole(common, common["opened"](tmp_path), 6)


def test_the_temporary_files_of_the_living_are_left_alone(tmp_path: Path) -> None:
    here, elsewhere, dead = _this_machine(), "0" * 8, 999_999_999
    for place, process in [(here, os.getpid()), (here, 1), (here, dead), (elsewhere, dead), (elsewhere, dead - 1)]:
        (tmp_path / f".manifest.json.{place}-{process}-00000000.tmp").touch()
    for name in (".other.tmp", "manifest.json.12.tmp", ".manifest.json.12.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{here}-{dead}-00000000.tmp").mkdir()
    (tmp_path / f".link.{here}-{dead}-00000000.tmp").symlink_to(tmp_path / ".other.tmp")
    old = time.time() - 2 * ABANDONED
    os.utime(tmp_path / f".manifest.json.{elsewhere}-{dead - 1}-00000000.tmp", (old, old))
    expected = [f".manifest.json.{elsewhere}-{dead - 1}-00000000.tmp", f".manifest.json.{here}-{dead}-00000000.tmp"]
    assert {file.name for file in left_behind(tmp_path)} == set(expected)
    (tmp_path / "link").symlink_to(tmp_path)
    assert left_behind(tmp_path / "link") == []


def test_threads_read_one_supernet_at_once(each_kind: Any) -> None:
    each_kind.build()
    supernet = each_kind.open()

    def read_all(order: int) -> None:
        for unit, level in each_kind.places[:: order * 2 - 1] * 20:
            each_kind.read(supernet, unit, level)
            if order and level == 1:
                supernet.release()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read_all, order) for order in (0, 1, 0, 1)]:
            done.result()


def test_a_thread_reads_what_another_writes(each_kind: Any) -> None:
    """And what it looks up meanwhile does not undo what is being written."""
    writer = each_kind.open()

    def read(unit: int, level: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                return each_kind.read(writer, unit, level)
            except InputError:
                time.sleep(0.001)
        raise TimeoutError

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, *place) for place in each_kind.places]
        for unit, candidates in each_kind.units.items():
            writer.write(unit.name, candidates, {})
        for done in reading:
            done.result()
    assert writer.complete and each_kind.open().complete


def test_a_reader_sees_what_was_built_since_it_began(each_kind: Any) -> None:
    reader = each_kind.open()
    with pytest.raises(InputError, match="its build is not finished"):
        reader.candidate(0, 1)
    each_kind.build("0.attention")
    each_kind.read(reader, 0, 1)
    assert reader.has("0.attention") and not reader.complete


def test_a_builder_waits_for_one_that_removes_the_folder(each_kind: Any) -> None:
    supernet = each_kind.build()
    again = each_kind.open()
    with ThreadPoolExecutor(1) as pool:
        with supernet.building():

            def build() -> bool:
                with again.building():
                    again.refresh()
                    return any(again.has(unit.name) for unit in each_kind.units)

            building = pool.submit(build)
            time.sleep(0.2)
            supernet.path.rename(supernet.path.with_name(".removed"))
        assert building.result(timeout=30) is False
    assert (supernet.path / ".lock").exists()


# File systems


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB of its own, where the system allows that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_build_goes_on_once_a_full_disk_has_space(disk: Path, common: dict[str, Any]) -> None:
    supernet, filler = common["opened"](disk), disk / "filler"
    filler.write_bytes(bytes(600_000))
    built = 0
    with (
        supernet.building(),
        pytest.raises(InputError, match=r"^cannot write .*unit\.\d\S+: No space left on device; free some sp"),
    ):
        for built in range(6):
            supernet.write(f"unit.{built}", common["candidates"](built), {})
    assert 0 < built < 6
    assert_whole(common, supernet, built)
    assert_whole(common, common["opened"](disk), built)
    assert not left_behind(supernet.path / "units")
    with suppress(OSError), open(filler, "ab", buffering=0) as file:
        while file.write(bytes(4096)):  # to the last page
            pass
    supernet.note_use(filler)  # cannot be written, and does not matter
    assert not any((supernet.path / "uses").iterdir())
    assert_whole(common, common["opened"](disk), built)
    filler.unlink()
    again = common["opened"](disk)
    with again.building():
        for unit in range(built, 6):
            again.write(f"unit.{unit}", common["candidates"](unit), {})
    assert_whole(common, common["opened"](disk), 6)


def test_a_read_only_disk_can_be_read(disk: Path, each_kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    each_kind = type(each_kind)(disk, each_kind.units)
    supernet = each_kind.build("0.attention")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    reader = each_kind.open()
    each_kind.read(reader, 0, 1)
    reader.note_use(disk / "run.json")
    assert not (supernet.path / "uses").exists()
    with pytest.raises(
        InputError, match=r"^cannot lock .*\.lock: Read-only file system; free some space or choose another"
    ):
        with reader.building():
            pass
    with pytest.raises(
        InputError, match=r"^cannot write .*: Read-only file system; free some space or choose another folder$"
    ):
        write_atomic(supernet.path / "manifest.json", b"")
    with pytest.raises(InputError, match=r"^cannot make the folder .*: Read-only file system; choose another one$"):
        Supernet.open_or_create(disk, reader.space, {"model": "b"}).lock()
    main(["ls", str(disk)])
    main(["verify", str(disk)])
    assert "unfinished" in (told := capsys.readouterr().out) and ": ok, 1 of 6 units" in told
    with pytest.raises(SystemExit):
        main(["gc", str(disk)])
    assert ": cannot lock " in capsys.readouterr().out
    each_kind.read(each_kind.open(), 0, 2)


def refused(code: int) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fails


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_told(each_kind: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As above, where nothing can be mounted; `PermissionError` is what other users get."""
    supernet = each_kind.build()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused(code))
        with pytest.raises(
            InputError, match=f"cannot lock .*{os.strerror(code)}; free some space or choose another folder"
        ):
            with supernet.building():
                pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refused(code))
        patch.setattr(Path, "unlink", refused(code))
        with pytest.raises(InputError, match=f"cannot write .*{os.strerror(code)}"):
            write_atomic(supernet.path / "manifest.json", b"")
        supernet.note_use(each_kind.root / "run.json")
    assert json.loads((supernet.path / "manifest.json").read_text())["units"].keys() == {
        unit.name for unit in each_kind.units
    }
    each_kind.read(each_kind.open(), 0, 1)
