"""A supernet's manifest: what its candidates depend on, and which units it holds. No torch here: `ls` answers at once.

`format`, `description` and `space` are what candidates depend on; their hash, the fingerprint, names the folder. `labels` are for
people and part of no identity. An entry of `units` has the size of the unit's file and the checksum of its header, which has the
checksums of all its tensors: whatever is read of a supernet is verified along this chain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from supernet.errors import InputError
from supernet.space import Space

FORMAT = 3
MANIFEST, LOCK, UNITS = "manifest.json", ".lock", "units"  # in a supernet's folder


def new_manifest(space: Space, description: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Of a supernet that holds no unit yet."""
    identity = {"format": FORMAT, "description": dict(description), "space": space.to_json(), "labels": dict(labels)}
    manifest: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back: JSON knows no tuples
    return manifest | {"fingerprint": fingerprint_of(manifest), "units": {}}


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """Hash of all that the candidates depend on."""
    identity = {key: manifest[key] for key in ("format", "description", "space")}
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def unit_path(folder: Path, name: str) -> Path:
    """The file of a unit's candidates."""
    return folder / UNITS / f"{name}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a supernet's folder says of itself, in this or another format; None if nothing, InputError if that is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["fingerprint"] != fingerprint_of(manifest):
            raise damaged(path, "its settings do not match its fingerprint")
        if int(manifest["format"]) == FORMAT:
            _check(path, manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"unreadable ({error})") from error
    return dict(manifest)


def _check(path: Path, manifest: Mapping[str, Any]) -> None:
    """InputError where what the fingerprint does not cover cannot be right; the checksums of the entries come to light later."""
    known = {unit["name"] for unit in manifest["space"]}
    for name, entry in manifest["units"].items():
        sizes = entry["bytes"], entry["header"]
        if name not in known or any(type(size) is not int or size < 1 for size in sizes) or type(entry["checksum"]) is not str:
            raise damaged(path, f"the entry of {name} is not whole, or not of its space")
    if not isinstance(manifest["labels"], dict):
        raise damaged(path, "its labels are none")


def check_size(path: Path, size: int) -> None:
    """InputError where a file is missing, or is not as long as its entry says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if found != size:
        raise damaged(path, f"it has {found:,} bytes and not {size:,}")


def damaged(path: Path, why: str) -> InputError:
    """What to do about a file of a supernet that is not as it was written."""
    folder = path.parent.parent if path.parent.name == UNITS else path.parent  # the whole supernet: its manifest names the file
    return InputError(f"the supernet file {path} is damaged: {why}; delete the folder {folder} and build again")
