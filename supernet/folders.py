"""Supernet folders as they lie on disk, for those who look after them: which are ours, in what state, and who uses them.

Nothing here needs torch, changes anything or trusts what it finds: a folder may be damaged, of an older format, or no supernet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from supernet.atomic import TEMPORARY
from supernet.errors import InputError
from supernet.manifest import FORMAT, LOCK, MANIFEST, UNITS, check_size, read_manifest, unit_path
from supernet.space import Space
from supernet.uses import USES, Use, uses_of

NAME = re.compile(r"[0-9a-f]{16}")  # of a supernet's folder


@dataclass(frozen=True)
class Folder:
    """A supernet's folder.

    Attributes:
        path: The folder.
        format: Of its files; this version's where nothing says otherwise.
        manifest: What it says; None where there is none, or none that this version can read.
        damage: What is wrong and what to do, where something is.
    """

    path: Path
    format: int
    manifest: dict[str, Any] | None
    damage: str | None

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name

    @cached_property
    def space(self) -> Space:
        """Units and levels; empty where they are not known."""
        return Space.from_json(self.manifest["space"] if self.manifest else ())

    @property
    def built(self) -> int:
        """Units that are there."""
        return len(self.manifest["units"]) if self.manifest else 0

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.damage:
            return "damaged"
        if self.format != FORMAT:
            return f"format {self.format}"
        if is_locked(self.path):
            return "being built"
        return "complete" if self.manifest and self.built == len(self.space.units) else "unfinished"

    def label(self, key: str) -> str:
        """What the one who made the supernet calls something; nothing where that is not known."""
        return str(self.manifest["labels"].get(key, "")) if self.manifest else ""

    @cached_property
    def bytes(self) -> int:
        """Of all files."""
        return size_of(self.path)

    @cached_property
    def uses(self) -> Sequence[Use]:
        """By runs that are still there."""
        return [use for use in uses_of(self.path) if use.counts]

    @property
    def last_used(self) -> datetime:
        """When a run opened it last, or when it was last written."""
        noted = [use.last_used for use in uses_of(self.path)]
        file = self.path / MANIFEST
        return noted[0] if noted else datetime.fromtimestamp((file if file.exists() else self.path).stat().st_mtime, UTC)


def supernet_folders(path: Path) -> list[Path]:
    """The supernets that `path` is or holds, links to others left out; InputError where there are none."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a supernet, or the folder of all supernets (supernet.root)")
    found = [path] if _is_ours(path) else [folder for folder in sorted(path.iterdir()) if _is_ours(folder)]
    if not found:
        inner = path / "supernets"
        hint = f"did you mean {inner}?" if inner.is_dir() else "give a supernet, or the folder of all supernets (supernet.root)"
        raise InputError(f"{path} holds no supernet; {hint}")
    return found


def inspect(path: Path) -> Folder:
    """A supernet's folder, with the damage that can be seen without reading candidates."""
    manifest = None
    try:
        manifest = read_manifest(path)
        if manifest is not None and manifest["format"] != FORMAT:
            return Folder(path, manifest["format"], None, None)
        for name, entry in manifest["units"].items() if manifest else ():
            check_size(unit_path(path, name), entry["bytes"])
    except InputError as error:
        return Folder(path, FORMAT, manifest, str(error))
    return Folder(path, FORMAT, manifest, None)


def is_locked(path: Path) -> bool:
    """Whether a living process builds this supernet."""
    if not (path / LOCK).exists():
        return False
    try:
        with FileLock(path / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it cannot be written, so nobody builds here
        return False


def size_of(path: Path) -> int:
    """Bytes of all files in a folder, which may change meanwhile."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def like_one(path: Path) -> bool:
    """Whether there is nothing in a folder but what a supernet has."""
    known = (MANIFEST, LOCK, UNITS, USES)
    return all(file.name in known or TEMPORARY.fullmatch(file.name) for file in path.iterdir())


def _is_ours(path: Path) -> bool:
    """Whether a folder is a supernet: by its manifest, or, where that is missing or damaged, by its name and what is in it."""
    if not path.is_dir() or path.is_symlink() or path.name.startswith("."):
        return False
    try:
        if read_manifest(path) is not None:
            return True
    except InputError:
        pass
    return bool(NAME.fullmatch(path.name)) and any(path.iterdir()) and like_one(path)
