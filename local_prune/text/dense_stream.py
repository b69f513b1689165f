"""The dense model's residual stream of the calibration text: what fits aim at, and the same in all builds of a run."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from local_prune.text.activations import SHARE, Activations
from local_prune.text.passes import TextWalk
from supernet.models.architecture import SubBlock
from supernet.system.memory import available

log = logging.getLogger(__name__)

MOST = 4 << 30  # bytes of a file of states
FREE = 0.5  # of the free disk space that such a file may take


def state_dtype(walk: TextWalk) -> torch.dtype:
    """Of the residual stream."""
    return torch.float32 if walk.parts[0].wide_residual else walk.model.dtype


def state_shapes(walk: TextWalk, batches: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """(batch, tokens, hidden) of each batch (batch, tokens)."""
    return [(*ids.shape, int(walk.model.config.hidden_size)) for ids in batches]


def state_bytes(walk: TextWalk, batches: Sequence[Tensor]) -> int:
    """What one residual stream of the text takes."""
    return sum(prod(shape) for shape in state_shapes(walk, batches)) * state_dtype(walk).itemsize


class DenseStream:
    """The dense model's residual stream, batch by batch, at the sub-block at work.

    Sub-blocks are numbered in the order of the forward pass, and visited in that order; before a build, `rewind`. With
    a file of states, what one build computes is read by the next.
    """

    def __init__(self, walk: TextWalk, ids: Tensor, batch: int, folder: Path, keep: bool = True) -> None:
        """Bind to text; nothing is computed yet.

        Args:
            walk: Through the dense model.
            ids: The text, (sequences, tokens).
            batch: Sequences that pass together.
            folder: Where states lie that main memory has no room for.
            keep: Whether states are kept for another build, in a file in that folder, if it has room.
        """
        self.walk, self.folder, self.keep = walk, folder, keep
        self.batches = ids.split(batch)
        self._states: Activations | None = None
        self._file: StateFile | None = None
        self._at = [-1] * len(self.batches)  # before which sub-block the state of each batch is

    @property
    def kept_bytes(self) -> int:
        """What the file takes; 0 where there is none."""
        size = (len(self.walk.parts) + 1) * state_bytes(self.walk, self.batches)
        return size if self.keep and has_room(size, self.folder) else 0

    def rewind(self) -> None:
        """Go before the first sub-block."""
        if self._states is None:
            shapes, dtype = state_shapes(self.walk, self.batches), state_dtype(self.walk)
            in_memory = state_bytes(self.walk, self.batches) <= SHARE * available()
            self._states = Activations(shapes, dtype, in_memory, self.folder)
            if self.kept_bytes:
                self._file = StateFile(shapes, dtype, self.folder)
        for index, ids in enumerate(self.batches):
            self._states[index] = self.walk.enter(ids)
            self._at[index] = 0

    def before(self, number: int, index: int) -> Tensor:
        """The state of a batch before a sub-block that it has come to, (batch, tokens, hidden) on the device."""
        assert self._states is not None
        if self._at[index] != number:
            assert self._file is not None
            self._states[index] = self._file.read(number, index)
            self._at[index] = number
        return self._states[index].to(self.walk.device)

    def behind(self, part: SubBlock, number: int, index: int) -> Tensor:
        """The state of a batch behind a sub-block that it has come to, whose block is on the device."""
        if self._at[index] == number + 1 or self._known(number + 1, index):
            return self.before(number + 1, index)
        hidden = self.before(number, index)
        behind = part(hidden, self.walk.context(part, hidden.shape[1]))
        assert self._states is not None
        self._states[index] = behind
        self._at[index] = number + 1
        if self._file is not None:
            self._file.write(number + 1, index, behind)
        return behind

    def pass_by(self, part: SubBlock, number: int, index: int) -> None:
        """Let a batch be behind a sub-block, whose block is on the device, whether or not anybody has asked for it."""
        if not self._known(number + 1, index):
            self.behind(part, number, index)

    def _known(self, number: int, index: int) -> bool:
        return self._file is not None and self._file.has(number, index)


class StateFile:
    """Equally typed tensors that are written once and read often, in a file that vanishes with the process.

    It is read and written piece by piece, not mapped, so that it takes no memory of the process.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, folder: Path) -> None:
        """Begin an empty file in a folder; `shapes` are those of the tensors of one number."""
        self._shapes, self._dtype = shapes, dtype
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self._held: set[tuple[int, int]] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="states-")  # noqa: SIM115  # as long as this object
        self._full = False

    def has(self, number: int, index: int) -> bool:
        """Whether tensor `index` of a number is there."""
        return (number, index) in self._held

    def write(self, number: int, index: int, tensor: Tensor) -> None:
        """Keep a tensor; nothing more is kept from when the disk is full."""
        if self._full:
            return
        content = tensor.to("cpu", self._dtype).contiguous().view(torch.uint8).flatten().numpy().data
        try:
            written = os.pwrite(self._file.fileno(), content, self._offset(number, index))
        except OSError as error:
            log.info("the dense model's activations are computed in each build: %s", error.strerror)
            written = -1
        self._full = written != len(content)
        if not self._full:
            self._held.add((number, index))

    def read(self, number: int, index: int) -> Tensor:
        """A tensor that is there, in main memory."""
        found = torch.empty(self._shapes[index], dtype=self._dtype)
        content = found.view(torch.uint8).flatten().numpy().data
        done = 0
        while done < len(content):
            done += os.preadv(self._file.fileno(), [content[done:]], self._offset(number, index) + done)
        return found

    def _offset(self, number: int, index: int) -> int:
        return number * self._starts[-1] + self._starts[index]


def has_room(size: int, folder: Path) -> bool:
    """Whether a file of so many bytes may be kept in a folder (of which the last parts need not exist yet)."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return size <= MOST and size <= FREE * shutil.disk_usage(there).free
