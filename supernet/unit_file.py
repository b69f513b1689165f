"""Writes and reads the file of one unit's candidates: safetensors, with each tensor's checksum in the metadata.

The file is memory-mapped, and a tensor is verified when this process reads it first, so that reading one level costs no
more than that level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from supernet.errors import InputError
from supernet.manifest import check_size, damaged
from supernet.system.records import WRONG

CHECKSUMS = "checksums"  # the one key of the metadata: a JSON object, because the order of several keys would be random
LENGTH = 8  # bytes at the start of a safetensors file that say how long the JSON behind them is
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def serialised(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Return the content of a file with these tensors, and what its entry in the manifest says of it."""
    checksums = {
        name: _checksum(tensor.reshape(-1).view(torch.uint8)) for name, tensor in tensors.items() if tensor.numel()
    }
    data = save(dict(tensors), {CHECKSUMS: json.dumps(checksums, sort_keys=True, separators=(",", ":"))})
    header = LENGTH + int.from_bytes(data[:LENGTH], "little")
    return data, {"bytes": len(data), "header": header, "checksum": xxhash.xxh3_128_hexdigest(data[:header])}


class UnitFile:
    """A unit's file, open for reading by any number of threads."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Map the file and verify its header.

        Args:
            path: The file.
            entry: The unit's entry in the manifest.

        Raises:
            InputError: The file cannot be read, or is not the one that was written.
        """
        self.path = path
        self.header_bytes: int = entry["header"]
        self._data = _mapped(path, entry["bytes"])
        header = self._data[: self.header_bytes]
        if _checksum(header) != entry["checksum"]:
            raise damaged(path, "its checksum does not match the manifest")
        try:
            self._tensors, self._checksums = _described(
                header[LENGTH:].numpy().tobytes(), self.header_bytes, entry["bytes"]
            )
        except WRONG as error:
            raise damaged(path, f"its header is none of ours ({type(error).__name__}: {str(error)[:200]})") from error
        self.names = tuple(self._tensors)
        self._verified: set[str] = set()

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each tensor, by name."""
        return {name: _size(tensor) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it was written. It shares its memory with the file, so it must not be changed.

        Raises:
            InputError: Its bytes are not those that were written.
            ValueError: There is no tensor of this name.
        """
        if name not in self._tensors:
            raise ValueError(f"there is no tensor {name}")
        described = self._tensors[name]
        start = self.header_bytes + described["data_offsets"][0]
        data = self._data[start : start + _size(described)]
        if len(data) and name not in self._verified:
            if _checksum(data) != self._checksums[name]:
                raise damaged(self.path, f"its checksum does not match the content of {name}")
            self._verified.add(name)
        return data.view(DTYPES[described["dtype"]]).view(described["shape"])


def _described(header: bytes, begin: int, end: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors that a header describes, and their checksums, both by name.

    Args:
        header: The header's JSON.
        begin: Where in the file the tensors begin, in bytes.
        end: Where the file ends, in bytes.

    Raises:
        One of `WRONG` where the header cannot be right, whoever wrote it.
    """
    tensors = json.loads(header)
    checksums = json.loads(tensors.pop("__metadata__")[CHECKSUMS])
    for name, described in tensors.items():
        (first, last), itemsize = described["data_offsets"], DTYPES[described["dtype"]].itemsize
        if any(type(number) is not int or number < 0 for number in (first, last, *described["shape"])):
            raise ValueError(f"{name[:200]!r} has shapes or places that are no whole numbers")
        if (
            last - first != prod(described["shape"]) * itemsize
            or not first <= last <= end - begin
            or (begin + first) % itemsize
        ):
            raise ValueError(f"{name[:200]!r} does not lie where it could")
        if last > first and type(checksums[name]) is not str:
            raise TypeError(f"the checksum of {name[:200]!r} is none")
    return tensors, checksums


def _size(described: Mapping[str, Any]) -> int:
    begin, end = described["data_offsets"]
    return int(end) - int(begin)


def _checksum(data: Tensor) -> str:
    """Return the hash of bytes (n,) uint8, which are not copied."""
    return xxhash.xxh3_128_hexdigest(data.numpy().data)


def _mapped(path: Path, size: int) -> Tensor:
    """Map the bytes of a file, (size,) uint8. No descriptor stays open, as a process may have fewer than units."""
    check_size(path, size)
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
