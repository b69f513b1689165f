"""Where the residual stream of the calibration text waits between sub-blocks: in main memory, or else in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from supernet.errors import InputError

SHARE = 0.5  # the share of the free memory that activations may take


class Activations:
    """A list of tensors (batch, tokens, hidden) of one dtype, each of which is undefined until it is set.

    They lie in one buffer: in main memory, or in a file in `folder` that vanishes with the process. The system pages it
    in and out as it likes.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, in_memory: bool, folder: Path) -> None:
        sizes = [prod(shape) for shape in shapes]
        buffer = torch.empty(sum(sizes), dtype=dtype) if in_memory else _file(sum(sizes), dtype, folder)
        self._views: list[Tensor] = [
            piece.view(shape) for piece, shape in zip(buffer.split(sizes), shapes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Tensor:
        return self._views[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._views[index].copy_(value)


def _file(size: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """Return an uninitialised tensor (size,) in a file that vanishes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
            _reserve(file.fileno(), size * dtype.itemsize)
            tensor: Tensor = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
            return tensor
    except OSError as error:
        need = f"{size * dtype.itemsize / 1e9:.1f} GB"
        raise InputError(
            f"cannot write {need} of activations to {folder}: {error.strerror}; use fewer sequences"
        ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Take the disk space now, as a page that found the disk full later would kill the process."""
    os.posix_fallocate(descriptor, 0, max(1, size))
