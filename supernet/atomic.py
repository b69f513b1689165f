"""Files that appear whole or not at all, and what a process that was killed may leave of them.

A full disk or a read-only folder is an InputError, and what was there before stays.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from supernet.errors import InputError

TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")  # with the process that writes it


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a full disk or a read-only folder is an InputError and leaves nothing behind."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # a read-only file system refuses to remove even what is not there
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error


def make_folder(path: Path) -> None:
    """Make a folder that may be there already; InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}; choose another one") from error


def left_behind(folder: Path) -> list[Path]:
    """Temporary files in a folder whose process is no more: nothing reads them, and nothing will finish them."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if (match := TEMPORARY.fullmatch(file.name)) and not _is_alive(int(match[1])))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
