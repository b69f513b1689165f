"""Optuna's journal files after a kill or a full disk: the one file of a run that is appended to, and so may end within
a line.

The next line would be written behind the torn one, and then neither could be read, ever again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from optuna.storages.journal import JournalFileSymlinkLock

from supernet.system.atomic import first_free
from supernet.system.records import WRONG

BLOCK = 1 << 16
BEGINNING = b'{"op_code":'  # of every line: Optuna writes this key first


def mend(file: Path, alone: bool) -> None:
    """Cut off an unfinished last line, under Optuna's own lock.

    Args:
        file: The journal; it need not be there yet.
        alone: No other process writes to it. A lock that lies there is a dead process's then, and need not be waited
            for.

    Raises:
        ValueError: It is there and no journal, which Optuna would write into all the same, or a device, which has no
            end.
    """
    if not file.exists():
        return
    if not file.is_file():
        raise ValueError("it is no regular file")
    with file.open("rb") as opened:
        if not BEGINNING.startswith(opened.read(len(BEGINNING))):
            raise ValueError("it is no journal of Optuna's")
    if alone:
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()
    try:
        with file.open("r+b") as opened:
            end = opened.seek(0, os.SEEK_END)
            whole = _end_of_lines(opened.fileno(), end)
            if whole < end:
                opened.truncate(whole)
    finally:
        lock.release()


def _end_of_lines(descriptor: int, end: int) -> int:
    """Return where the last whole line of the first `end` bytes of a file ends."""
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def is_readable(file: Path) -> bool:
    """Whether every line of a journal is one: Optuna sees a broken last line only once another is behind it."""
    if not file.exists():
        return True
    with file.open("rb") as opened:
        for line in opened:
            try:
                json.loads(line)["op_code"]
            except WRONG:
                return False
    return True


def set_aside(file: Path) -> Path:
    """Rename a journal that cannot be read, and return its new name."""
    return file.rename(first_free(file, "damaged"))
