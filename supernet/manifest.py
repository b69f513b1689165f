"""Reads and writes a supernet's manifest, which says what its candidates depend on and which units it holds.

Its fields `format`, `description` and `space` are what candidates depend on; their hash, the fingerprint, names the
folder. The field `labels` is for people and plays no part in that. An entry of `units` has the size of the unit's file,
the checksum of its header, and what the build noted of it (errors that searches decide by, seconds). The header of a
unit's file has the checksums of all its tensors, and one checksum covers the whole manifest: so whatever is read of a
supernet is verified along this chain. Nothing here needs torch, so that `ls` answers at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from supernet.errors import InputError
from supernet.space import Space, Unit
from supernet.system.records import WRONG, UnreadableError, read_json, verified, write_record

FORMAT = 4
MANIFEST, LOCK, UNITS = "manifest.json", ".lock", "units"  # names in a supernet's folder
# The most bytes of a manifest that are read: one of a thousand units with twenty levels has less than a tenth of that.
MOST = 1 << 24
# The name of a unit is the name of its file: it must not lead elsewhere, and can be printed as it is.
UNIT_NAME = re.compile(r"\w[\w.\-]{0,199}")


def new_manifest(space: Space, description: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a supernet that holds no unit yet."""
    identity = {"format": FORMAT, "description": dict(description), "space": space.to_json(), "labels": dict(labels)}
    manifest: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back: JSON knows no tuples
    return manifest | {"fingerprint": fingerprint_of(manifest), "units": {}}


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """Return the hash of all that the candidates depend on."""
    identity = {key: manifest[key] for key in ("format", "description", "space")}
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def unit_path(folder: Path, name: str) -> Path:
    """Return the path of the file with a unit's candidates."""
    return folder / UNITS / f"{name}.safetensors"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, in place of the one that is there; InputError where that is not possible."""
    write_record(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a supernet's folder, which may be of another format; None where there is none.

    Raises:
        InputError: It is damaged, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path, MOST)
        if content is None:
            return None
        if content["fingerprint"] != fingerprint_of(content):
            raise UnreadableError("its settings do not match its fingerprint")
        if type(content["format"]) is not int:
            raise UnreadableError("its format is no number")
        if content["format"] != FORMAT:
            return dict(content)
        manifest = verified(content)
        _check(manifest)
    except UnreadableError as error:
        raise damaged(path, str(error)) from error
    except WRONG as error:
        raise damaged(path, f"it is no manifest ({type(error).__name__}: {str(error)[:200]})") from error
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise UnreadableError where a value cannot be right: a checksum says only that it was written so by somebody."""
    units = {unit.name: unit for unit in Space.from_json(manifest["space"]).units}
    for name in units:
        if not UNIT_NAME.fullmatch(name):
            raise UnreadableError(f"a unit is called {name[:200]!r}, which names no file of a supernet")
    for name, entry in manifest["units"].items():
        if name not in units or not _is_whole(entry, units[name]):
            raise UnreadableError(f"the entry of {name[:200]!r} is not whole, or not of its space")
    if not isinstance(manifest["labels"], dict):
        raise UnreadableError("its labels are none")


def _is_whole(entry: Mapping[str, Any], unit: Unit) -> bool:
    """Return whether an entry has what it must have; its errors are one number for each level but the dense one."""
    sizes, errors = (entry["bytes"], entry["header"]), entry.get("errors")
    if (
        any(type(size) is not int or size < 1 for size in sizes)
        or sizes[1] > sizes[0]
        or type(entry["checksum"]) is not str
    ):
        return False
    if errors is None:
        return True
    numbers = isinstance(errors, list) and all(type(one) in (int, float) and not one < 0 for one in errors)
    return numbers and len(errors) == len(unit.levels) - 1


def check_size(path: Path, size: int) -> None:
    """Raise InputError where a file is missing, or is not as long as its entry says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if found != size:
        raise damaged(path, f"it has {found:,} bytes and not {size:,}")


def damaged(path: Path, why: str) -> InputError:
    """Return the error for a supernet's manifest or the file of a unit that is not as it was written."""
    # The user is told to delete the whole supernet, as its manifest names the file.
    folder = path.parent if path.name == MANIFEST else path.parent.parent
    return InputError(f"the supernet file {path} is damaged: {why}; delete the folder {folder} and build again")
