"""Stores a supernet on disk: a safetensors file for each unit, a manifest, and notes of the runs that use it.

    <root>/<fingerprint>/manifest.json                      `supernet.manifest`
    <root>/<fingerprint>/units/<unit name>.safetensors      `supernet.unit_file`
    <root>/<fingerprint>/uses/<hash of a path>.json         `supernet.uses`

The fingerprint covers everything that candidates depend on (model, data, method, settings, space), so the same settings
find the same supernet. Every write is atomic and a unit counts only once the manifest names it with its checksum: an
interrupted build continues after its last whole unit, and a damaged file is never taken for a candidate. Files are
replaced and never changed, so any number of processes may read, without a lock and without being allowed to write,
while one builds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from supernet.candidates import Candidate, count
from supernet.encodings.codec import decode, encode
from supernet.errors import InputError
from supernet.manifest import LOCK, MANIFEST, damaged, new_manifest, read_manifest, unit_path, write_manifest
from supernet.space import Space
from supernet.system.atomic import make_folder, write_atomic
from supernet.system.records import WRONG
from supernet.unit_file import UnitFile, serialised
from supernet.uses import note_use

log = logging.getLogger(__name__)


class Supernet:
    """The candidates of one space. They are read when they are asked for, by any number of threads.

    `open_or_create` makes one.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest  # replaced as a whole, never changed: other threads read it
        self.space = Space.from_json(manifest["space"])
        self._index = {unit.name: i for i, unit in enumerate(self.space.units)}
        self._open: dict[str, UnitFile] = {}
        self._changing = threading.RLock()  # held by the thread that replaces the manifest, or opens a file

    @classmethod
    def open_or_create(
        cls, root: Path, space: Space, description: Mapping[str, Any], labels: Mapping[str, Any] | None = None
    ) -> Supernet:
        """Return the supernet of these settings below `root`, whole or begun; where there is none, a new empty one.

        Args:
            root: The folder of all supernets.
            space: The units and their levels.
            description: A JSON-able record of all that the candidates depend on besides the space.
            labels: A JSON-able record for people (`python -m supernet ls`). A new supernet gets it; it plays no part in
                finding one.

        Raises:
            InputError: The supernet of these settings is damaged, or cannot be read.
        """
        manifest = new_manifest(space, description, labels or {})
        supernet = cls(root / manifest["fingerprint"][:16], manifest)
        supernet.refresh()
        return supernet

    @property
    def fingerprint(self) -> str:
        """The hash of all that the candidates depend on."""
        return str(self.manifest["fingerprint"])

    @property
    def complete(self) -> bool:
        """Whether every unit has its candidates."""
        return all(self.has(unit.name) for unit in self.space.units)

    def has(self, name: str) -> bool:
        """Return whether the unit of this name is built."""
        return name in self.manifest["units"]

    def note_use(self, referrer: Path) -> None:
        """Note that a file of a run lists this supernet's fingerprint, so that `gc` keeps it (`supernet.uses`)."""
        note_use(self.path, self.fingerprint, referrer)

    def lock(self) -> FileLock:
        """Return the lock that is held while building, so that two runs with the same settings do not both build.

        The kernel frees the lock of a process that dies.
        """
        make_folder(self.path)
        return FileLock(self.path / LOCK)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the lock while building. Where another process holds it, tell the user and wait."""
        try:
            try:
                lock = self._acquired()
            except FileNotFoundError:  # another process was removing the folder, so it is made once more
                lock = self._acquired()
        except OSError as error:
            why = f"cannot lock {self.path / LOCK}: {error.strerror}"
            raise InputError(f"{why}; free some space or choose another folder") from error
        try:
            yield
        finally:
            lock.release()

    def _acquired(self) -> FileLock:
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is building %s; waiting for it", self.path)
            lock.acquire()
        return lock

    def refresh(self) -> None:
        """Read again what is on disk, as another process may have built more; InputError where that is damaged."""
        with self._changing:
            manifest = read_manifest(self.path)
            if manifest is not None and manifest["fingerprint"] != self.fingerprint:
                raise damaged(self.path / MANIFEST, "it is another supernet's")
            self.manifest = manifest or self.manifest | {"units": {}}

    def write(self, name: str, candidates: Sequence[Candidate], record: Mapping[str, Any]) -> None:
        """Store a unit's candidates of levels 1, 2, ... (level 0 is dense), then name them in the manifest.

        Args:
            name: The name of the unit.
            candidates: One for each level of the unit but level 0.
            record: JSON-able notes of the unit's build (relative output errors, seconds).

        Raises:
            ValueError: Candidates do not keep what their levels say.
            InputError: The disk is full, or the folder cannot be written.
        """
        unit = self.space.units[self._index[name]]
        kept = [count(candidate) for candidate in candidates]
        if kept != [level.kept for level in unit.levels[1:]]:
            raise ValueError(f"{name}: candidates keep {kept}, the levels ask for {unit.levels[1:]}")
        data, entry = serialised(encode(candidates))
        write_atomic(unit_path(self.path, name), data)
        with self._changing:
            manifest = self.manifest | {"units": self.manifest["units"] | {name: {**record, **entry}}}
            write_manifest(self.path, manifest)
            self.manifest = manifest

    @property
    def errors(self) -> list[list[float] | None]:
        """The relative squared output error of each unit's levels, 0 for the dense one.

        None for units whose build noted none.
        """
        records = (self.manifest["units"].get(unit.name, {}).get("errors") for unit in self.space.units)
        return [None if record is None else [0.0, *record] for record in records]

    def candidate(self, unit: int, level: int, device: torch.device | str = "cpu") -> Candidate:
        """Return the candidate of a unit (index in the space) at a level of at least 1, on `device`.

        What is read is verified when this process reads it first. On the CPU a candidate may share its memory with the
        file, so it must not be changed.

        Raises:
            ValueError: The unit has no such level.
            InputError: The unit is not built yet, or its file is damaged.
        """
        if not 0 < level < len(self.space.units[unit].levels):  # the caller's mistake: it says nothing about the files
            raise ValueError(f"{self.space.units[unit].name} has no level {level}")
        file = self.unit_file(self.space.units[unit].name)

        def read(name: str) -> Tensor:
            return file.tensor(name).to(device)

        try:
            return decode(read, file.names, level)
        except WRONG as error:
            raise damaged(file.path, f"level {level} cannot be decoded ({error})") from error

    def unit_file(self, name: str) -> UnitFile:
        """Return the file of a unit's candidates, mapped when it is first asked for; InputError if it is not built."""
        if (file := self._open.get(name)) is not None:
            return file
        with self._changing:
            if name not in self._open:
                if not self.has(name):
                    self.refresh()  # another process may have built it meanwhile
                if not self.has(name):
                    raise InputError(
                        f"the supernet {self.path} has no candidates of {name}: its build is not finished; add build "
                        "to stages"
                    )
                self._open[name] = UnitFile(unit_path(self.path, name), self.manifest["units"][name])
            return self._open[name]

    def release(self) -> None:
        """Let go of the files that are mapped, and of their pages; they are mapped again when they are read."""
        with self._changing:
            self._open = {}
