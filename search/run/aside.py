"""`fresh=true`: the run in a directory is moved aside, all of it or nothing, whenever the process that does so is
killed.

Its files are gathered in one folder within the directory, the checkpoint first: from then on there is no run here, and
whoever locks the directory next finishes what was begun before anything else. Then the folder is renamed. Hydra's own
files of the job that is at work stay: they are being written.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from supernet.errors import InputError
from supernet.system.atomic import first_free
from supernet.system.records import UnreadableError, read_record
from supernet.uses import note_use

CHECKPOINT = "checkpoint"  # the folder that makes a run
GATHERED = ".aside"


def move_aside(path: Path, results: Sequence[str]) -> None:
    """Move a run's files to the first free folder `<path>.old-<n>`, and note there which supernets the run uses.

    Args:
        path: The run's directory.
        results: Names of what stages leave in it, beside the checkpoint.
    """
    gathered = path / GATHERED
    try:
        gathered.mkdir(exist_ok=True)
        if (path / CHECKPOINT).exists():
            (path / CHECKPOINT).rename(gathered / CHECKPOINT)
        else:  # somebody deleted it: what is left is no run, and goes the same way
            (gathered / CHECKPOINT).mkdir()
    except OSError as error:
        with suppress(OSError):
            gathered.rmdir()
        raise _cannot(path, path / CHECKPOINT, error) from error
    finish_moving(path, results)


def finish_moving(path: Path, results: Sequence[str]) -> None:
    """Finish a move that a killed process began. Where that fails, put everything back where it was."""
    gathered = path / GATHERED
    if not gathered.is_dir():
        return
    if not (gathered / CHECKPOINT).exists():  # nothing was moved yet
        with suppress(OSError):
            gathered.rmdir()
        return
    file = gathered
    try:
        for file in (path / name for name in results):
            if file.exists():
                file.rename(gathered / file.name)
        file, target = gathered, first_free(path, "old")
        _refer_from(target, gathered)
        gathered.rename(target)
    except OSError as error:
        for name in (*results, CHECKPOINT):  # the checkpoint last: a kill in between must find it where it says so
            with suppress(OSError):
                (gathered / name).rename(path / name)
        with suppress(OSError):
            gathered.rmdir()
        raise _cannot(path, file, error) from error


def _refer_from(target: Path, gathered: Path) -> None:
    """Note that the run uses its supernets from its new folder, before it is there, so that none is ever unused."""
    listed = Path(CHECKPOINT) / "supernets.json"
    try:
        supernets = read_record(gathered / listed) or {}
    except (UnreadableError, InputError):  # then they will be built again, should they be needed
        return
    for fingerprint, supernet in supernets.items():
        if Path(str(supernet)).is_dir():
            note_use(Path(str(supernet)), fingerprint, target / listed)


def _cannot(path: Path, file: Path, error: OSError) -> InputError:
    why = f"cannot move {file} aside: {error.strerror}"
    return InputError(f"{why}; {path} is left as it was: make it movable, or choose another hydra.run.dir")
