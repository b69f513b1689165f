"""The supernet on disk: one safetensors file per unit, and a manifest with space, checksums and fingerprint.

    <root>/<fingerprint>/manifest.json
    <root>/<fingerprint>/units/<unit name>.safetensors

The fingerprint covers everything that candidates depend on (model, data, method, settings, space), so the same settings find
the same supernet. Every write is atomic and a unit counts only once the manifest names it with its checksum: an interrupted
build continues after its last whole unit, and a damaged file is never taken for a candidate.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from supernet.encoding import Candidate, count, decode, encode, moved
from supernet.errors import InputError
from supernet.space import Space

log = logging.getLogger(__name__)

FORMAT = 2


class Supernet:
    """The candidates of one space, read lazily. `open_or_create` makes one."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.space = Space.from_json(manifest["space"])
        self._index = {unit.name: i for i, unit in enumerate(self.space.units)}
        self._open: dict[str, Any] = {}

    @classmethod
    def open_or_create(cls, root: Path, space: Space, description: Mapping[str, Any]) -> Supernet:
        """The supernet of these settings below `root`: the one on disk, whole or begun, or a new empty one.

        Args:
            root: Folder of all supernets.
            space: Units and levels.
            description: JSON-able record of all that the candidates depend on besides the space.
        """
        identity = {"format": FORMAT, "description": dict(description), "space": space.to_json()}
        fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())
        path = root / fingerprint[:16]
        supernet = cls(path, identity | {"fingerprint": fingerprint, "units": {}})
        supernet.refresh()
        return supernet

    @property
    def fingerprint(self) -> str:
        """Hash of all that the candidates depend on."""
        return str(self.manifest["fingerprint"])

    @property
    def complete(self) -> bool:
        """Whether every unit has its candidates."""
        return all(unit.name in self.manifest["units"] for unit in self.space.units)

    def has(self, name: str) -> bool:
        """Whether the unit of this name is built."""
        return name in self.manifest["units"]

    def lock(self) -> FileLock:
        """Held while building, so that two runs with the same settings do not both build. The kernel frees a dead owner's."""
        _make_folder(self.path)
        return FileLock(self.path / ".lock")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the lock; where another process holds it, say so and wait."""
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is building %s; waiting for it", self.path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def refresh(self) -> None:
        """Read what is on disk, built before or by another process; InputError where that is damaged."""
        manifest_path = self.path / "manifest.json"
        if not manifest_path.exists():
            return
        try:
            manifest = json.loads(manifest_path.read_text())
            same = all(manifest[key] == value for key, value in self.manifest.items() if key != "units")
            whole = all({"file", "bytes", "checksum"} <= set(entry) for entry in manifest["units"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(manifest_path, f"unreadable ({error})") from error
        if not same or not whole:
            raise _damaged(manifest_path, "its settings do not match its fingerprint" if whole else "a unit's entry is not whole")
        self.manifest = manifest

    def write(self, name: str, candidates: Sequence[Candidate], record: Mapping[str, Any]) -> None:
        """Store a unit's candidates of levels 1, 2, ... (level 0 is dense), then name them in the manifest.

        Args:
            name: The unit.
            candidates: One a level of the unit, without level 0.
            record: JSON-able log of the unit's build (relative output errors, seconds).
        """
        unit = self.space.units[self._index[name]]
        kept = [count(candidate) for candidate in candidates]
        if kept != [level.kept for level in unit.levels[1:]]:
            raise ValueError(f"{name}: candidates keep {kept}, the levels ask for {unit.levels[1:]}")
        data = save(encode(candidates))
        file = f"units/{name}.safetensors"
        write_atomic(self.path / file, data)
        entry = {"file": file, "bytes": len(data), "checksum": xxhash.xxh3_128_hexdigest(data), **record}
        self.manifest["units"][name] = entry
        write_atomic(self.path / "manifest.json", json.dumps(self.manifest, indent=1).encode())

    def candidate(self, unit: int, level: int, device: torch.device | str = "cpu") -> Candidate:
        """The candidate of a unit (index in the space) at a level of at least 1."""
        reader = self._reader(self.space.units[unit].name)
        return moved(decode(reader.get_tensor, reader.keys(), level), device)

    def release(self) -> None:
        """Let go of the files that are mapped, and of their pages; they are mapped again when they are read."""
        self._open.clear()

    def _reader(self, name: str) -> Any:
        """A memory-mapped file of candidates; its checksum is verified when it is first read."""
        if name not in self._open:
            if not self.has(name):
                raise InputError(
                    f"the supernet {self.path} has no candidates of {name}: its build is not finished; add build to stages"
                )
            entry = self.manifest["units"][name]
            path = self.path / entry["file"]
            try:
                if xxhash.xxh3_128_hexdigest(path.read_bytes()) != entry["checksum"]:
                    raise _damaged(path, "its checksum does not match the manifest")
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _damaged(path, f"unreadable ({error})") from error
        return self._open[name]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a full disk or a read-only folder is an InputError and leaves nothing behind."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}; choose another one") from error


def _damaged(path: Path, why: str) -> InputError:
    folder = path.parent.parent if path.parent.name == "units" else path.parent  # the whole supernet: its manifest names the file
    return InputError(f"the supernet file {path} is damaged: {why}; delete the folder {folder} and build again")
