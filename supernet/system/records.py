"""Reads and writes JSON files with a checksum, so that nothing else is ever taken for what was written.

Other tools can still read them: the checksum is one more field. A file that was edited by hand is refused, and so is
one of a version that wrote no checksums. Parsers are never given more than a limit, and whatever one raises comes out
as `UnreadableError`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from supernet.errors import InputError
from supernet.system.atomic import write_atomic

CHECKSUM = "checksum"  # the name of the field
MOST = 1 << 30  # the most bytes of a file that are read
# Whatever reading a file that was tampered with may raise: deep nesting is a RecursionError, long numbers a ValueError.
WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError, RecursionError)


class UnreadableError(Exception):
    """A file is not as it was written. The message says in what way; what to do about it is the caller's to say."""


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object and its checksum, whole or not at all; InputError where that is not possible."""
    plain = json.loads(json.dumps(content))  # as it will be read back: JSON knows no tuples
    write_atomic(path, (json.dumps(plain | {CHECKSUM: checksum_of(plain)}, indent=1) + "\n").encode())


def read_record(path: Path, most: int = MOST) -> dict[str, Any] | None:
    """Read the object that was written, without its checksum; None where there is no file.

    Raises:
        UnreadableError: The file is not as it was written.
        InputError: The system does not let us read it.
    """
    content = read_json(path, most)
    return None if content is None else verified(content)


def read_json(path: Path, most: int = MOST) -> Any:
    """Read a JSON file that may have no checksum; None where there is no file. Raises what `read_record` does."""
    data = read_regular(path, most)
    if data is None:
        return None
    try:
        return json.loads(data)
    except WRONG as error:
        raise UnreadableError(f"it is no JSON: {_short(error)}") from error


def read_regular(path: Path, most: int = MOST) -> bytes | None:
    """Return the bytes of a file; None where there is none. Raises what `read_record` does.

    Folders, pipes and devices are refused, as to read them might never end.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError("it is no regular file")
            if status.st_size > most:
                raise UnreadableError(f"it has {status.st_size:,} bytes, and no such file has more than {most:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise UnreadableError("it is a folder") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise UnreadableError(f"it cannot be opened: {_short(error)}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe that nobody writes to stops us for ever


def verified(content: Any) -> dict[str, Any]:
    """Return a parsed object without its checksum; UnreadableError where the checksum does not match."""
    if not isinstance(content, dict):
        raise UnreadableError("it holds no object")
    if CHECKSUM not in content:
        raise UnreadableError("it has no checksum: it is of an earlier version, or was not written by this program")
    plain = {key: value for key, value in content.items() if key != CHECKSUM}
    if content[CHECKSUM] != checksum_of(plain):
        raise UnreadableError("it was changed since it was written: its checksum does not match")
    return plain


def checksum_of(plain: Mapping[str, Any]) -> str:
    """Return the hash of a parsed JSON object, which does not depend on its layout in the file."""
    try:
        return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
    except WRONG as error:
        raise UnreadableError(f"it cannot be verified: {_short(error)}") from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
