"""Writes files that appear whole or not at all, and removes the temporary files that a killed process may leave.

A full disk or a read-only folder is an InputError, and what was there before stays.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import time
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

import xxhash

from supernet.errors import InputError

# The name of a temporary file says on which machine its process ran, and which process it was; a random part makes it
# unique.
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.tmp")
ABANDONED = 24 * 3600.0  # seconds after which a file of another machine is left behind: no write takes that long


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: The disk is full, or the folder cannot be written. Nothing is left behind then.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{_this_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # also Ctrl-C
            with suppress(OSError):  # a read-only file system refuses to remove even what is not there
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error
    sync_folder(path.parent)


def first_free(path: Path, word: str) -> Path:
    """Return the first path of `<path>.<word>-1`, `<path>.<word>-2`, ... that does not exist."""
    return next(one for number in count(1) if not (one := path.with_name(f"{path.name}.{word}-{number}")).exists())


def sync_folder(folder: Path) -> None:
    """Make sure that what was renamed in a folder survives a power failure, if the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder that may be there already; InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}; choose another one") from error


def left_behind(folder: Path) -> list[Path]:
    """Return temporary files that nobody will finish, as their process on this machine has ended, or they are old.

    Links are not followed. Whether a process of another machine or container still runs cannot be seen from here.
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    return sorted(Path(entry.path) for entry in files if _is_abandoned(entry))


def sweep(folder: Path) -> None:
    """Remove temporary files that dead processes left in a folder, where that is possible."""
    with suppress(OSError):
        for file in left_behind(folder):
            file.unlink(missing_ok=True)


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    match = TEMPORARY.fullmatch(entry.name)
    assert match is not None
    if match[1] == _this_machine() and not _is_alive(int(match[2])):
        return True
    with suppress(FileNotFoundError):
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED
    return False


@cache
def _this_machine() -> str:
    """Return a word that tells this machine, since it was started, and this container from all others.

    The number of a process means nothing outside of them.
    """
    parts = [platform.node()]
    with suppress(OSError):  # where there is no such thing, the name will do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return xxhash.xxh32_hexdigest("\n".join(parts).encode())


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's process
        return True
    return True
