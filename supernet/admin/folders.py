"""Looks at folders of supernets: which folders are supernets, what state they are in, and which runs use them.

Nothing here needs torch, changes anything, follows a link or trusts what it finds: a folder may be damaged, of an older
format, or no supernet at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from supernet.errors import InputError
from supernet.manifest import FORMAT, LOCK, MANIFEST, UNIT_NAME, UNITS, check_size, read_manifest, unit_path
from supernet.space import Space
from supernet.system.atomic import TEMPORARY
from supernet.uses import USES, Use, uses_of

NAME = re.compile(r"[0-9a-f]{16}")  # what the folder of a supernet is called
UNIT_FILE = re.compile(rf"{UNIT_NAME.pattern}\.safetensors")
USE_FILE = re.compile(r"[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Folder:
    """A supernet's folder.

    Attributes:
        path: The folder.
        format: The format of its files; this version's where nothing says otherwise.
        manifest: The content of its manifest; None where there is none, or none that this version can read.
        damage: What is wrong and what to do about it; None where nothing is wrong.
    """

    path: Path
    format: int
    manifest: dict[str, Any] | None
    damage: str | None

    @property
    def name(self) -> str:
        """The folder's name, made fit to be printed."""
        return plain(self.path.name)

    @cached_property
    def space(self) -> Space:
        """The units and their levels; empty where they are not known."""
        return Space.from_json(self.manifest["space"] if self.manifest else ())

    @property
    def built(self) -> int:
        """How many units have their candidates."""
        return len(self.manifest["units"]) if self.manifest else 0

    @property
    def state(self) -> str:
        """The state of the supernet in a word or two: damaged, being built, unfinished, complete, or its old format."""
        if self.damage:
            return "damaged"
        if self.format != FORMAT:
            return f"format {self.format}"
        if is_locked(self.path):
            return "being built"
        return "complete" if self.manifest and self.built == len(self.space.units) else "unfinished"

    def label(self, key: str) -> str:
        """Return a label that the run gave the supernet when it made it, fit to be printed; empty without one."""
        return plain(str(self.manifest["labels"].get(key, ""))) if self.manifest else ""

    @cached_property
    def bytes(self) -> int:
        """The size of all files in the folder, in bytes."""
        return size_of(self.path)

    @cached_property
    def uses(self) -> Sequence[Use]:
        """The uses by runs that are still there."""
        return [use for use in uses_of(self.path) if use.counts]

    @property
    def last_used(self) -> datetime:
        """When a run opened the supernet last; where that was not noted, when it was last written."""
        if noted := uses_of(self.path):
            return noted[0].last_used
        for written in (self.path / MANIFEST, self.path):
            with suppress(OSError):
                return datetime.fromtimestamp(written.lstat().st_mtime, UTC)
        return datetime.fromtimestamp(0, UTC)  # it was removed meanwhile


def supernet_folders(path: Path) -> list[Path]:
    """Return `path` itself if it is a supernet, else the supernets in it, without links; InputError without any."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a supernet, or the folder of all supernets (supernet.root)")
    found = [path] if _is_ours(path) else [folder for folder in sorted(path.iterdir()) if _is_ours(folder)]
    if not found:
        inner = path / "supernets"
        hint = (
            f"did you mean {inner}?"
            if inner.is_dir()
            else "give a supernet, or the folder of all supernets (supernet.root)"
        )
        raise InputError(f"{path} holds no supernet; {hint}")
    return found


def inspect(path: Path) -> Folder:
    """Look at a supernet's folder, and at the damage that can be seen without reading candidates."""
    manifest = None
    try:
        manifest = read_manifest(path)
        if manifest is not None and manifest["format"] != FORMAT:
            return Folder(path, manifest["format"], None, None)
        for name, entry in manifest["units"].items() if manifest else ():
            check_size(unit_path(path, name), entry["bytes"])
    except InputError as error:
        return Folder(path, FORMAT, manifest, plain(str(error)))
    return Folder(path, FORMAT, manifest, None)


def is_locked(path: Path) -> bool:
    """Return whether a living process builds this supernet."""
    lock = path / LOCK
    if lock.is_symlink() or not lock.is_file():  # to open what a link points at would change it
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it cannot be written, so nobody builds here
        return False


def size_of(path: Path) -> int:
    """Return the bytes of all files in a folder, at any depth. Files may come and go meanwhile."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def foreign(path: Path) -> Path | None:
    """Return the first thing in a folder, at any depth, whose name or type says that it belongs to no supernet.

    None says that everything may be a supernet's.
    """
    with suppress(FileNotFoundError):  # removed meanwhile
        return next(_foreign(path), None)
    return None


def _foreign(path: Path) -> Iterator[Path]:
    for entry in _entries(path):
        inner = {UNITS: UNIT_FILE, USES: USE_FILE}.get(entry.name)
        if inner is None:
            if entry.name not in (MANIFEST, LOCK) and not TEMPORARY.fullmatch(entry.name) or not is_plain_file(entry):
                yield Path(entry.path)
        elif not entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
        else:
            for file in _entries(Path(entry.path)):
                if not (inner.fullmatch(file.name) or TEMPORARY.fullmatch(file.name)) or not is_plain_file(file):
                    yield Path(file.path)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_plain_file(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a file, and no folder, link, pipe or device."""
    return entry.is_file(follow_symlinks=False)


def plain(text: str) -> str:
    """Return a text fit to be printed: line breaks, escape sequences and what no terminal shows are written out.

    Names and labels in a folder may be anybody's.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _is_ours(path: Path) -> bool:
    """Return whether a folder is a supernet. Its manifest tells; without a readable one, its name and content do."""
    if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
        return False
    with suppress(InputError):
        if read_manifest(path) is not None:
            return True
    try:
        return bool(NAME.fullmatch(path.name)) and any(path.iterdir()) and foreign(path) is None
    except OSError:  # it is not for us to look at, which `inspect` will tell the user
        return bool(NAME.fullmatch(path.name))
