"""The dense model's residual stream of the calibration text, which fits aim at.

It is the same in all builds of a run, so what the first build computes is kept on disk for those that follow.
"""

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

MOST = 4 << 30  # the most bytes of a file of states
FREE = 0.5  # the share of the free disk space that such a file may take


def state_dtype(walk: TextWalk) -> torch.dtype:
    """Return the dtype of the residual stream."""
    return torch.float32 if walk.parts[0].wide_residual else walk.model.dtype


def state_shapes(walk: TextWalk, batches: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return the shape of the residual stream, (batch, tokens, hidden), for each batch of ids (batch, tokens)."""
    return [(*ids.shape, int(walk.model.config.hidden_size)) for ids in batches]


def state_bytes(walk: TextWalk, batches: Sequence[Tensor]) -> int:
    """Return how many bytes one residual stream of the text takes."""
    return sum(prod(shape) for shape in state_shapes(walk, batches)) * state_dtype(walk).itemsize


class DenseStream:
    """Gives the dense model's residual stream at the sub-block at work, batch by batch.

    Sub-blocks are numbered in the order of the forward pass, and a build visits them in that order. `rewind` is called
    before each build. If there is room for a file of states, what one build computes is read by the next.
    """

    def __init__(self, walk: TextWalk, ids: Tensor, batch: int, folder: Path, keep: bool = True) -> None:
        """Bind to text; nothing is computed yet.

        Args:
            walk: The walk of text through the dense model.
            ids: The text, (sequences, tokens).
            batch: How many sequences pass together.
            folder: Where states lie that main memory has no room for.
            keep: Whether states are kept for another build, in a file in that folder, if there is room for it.
        """
        self.walk, self.folder, self.keep = walk, folder, keep
        self.batches = ids.split(batch)
        self._states: Activations | None = None
        self._file: StateFile | None = None
        self._at = [-1] * len(self.batches)  # before which sub-block the state of each batch is

    @property
    def kept_bytes(self) -> int:
        """The bytes that the file of states takes, or will take; 0 where there is none."""
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
        """Return the state of a batch before the sub-block that it has come to.

        Its shape is (batch, tokens, hidden), and it is on the device.
        """
        assert self._states is not None
        if self._at[index] != number:
            assert self._file is not None
            self._states[index] = self._file.read(number, index)
            self._at[index] = number
        return self._states[index].to(self.walk.device)

    def behind(self, part: SubBlock, number: int, index: int) -> Tensor:
        """Return the state of a batch behind the sub-block that it has come to, whose block is on the device."""
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
        """Take a batch behind a sub-block, whose block is on the device, unless its state there is in the file.

        Called for each batch when a sub-block is done with, whether or not anybody has asked for the state behind it.
        """
        if not self._known(number + 1, index):
            self.behind(part, number, index)

    def _known(self, number: int, index: int) -> bool:
        return self._file is not None and self._file.has(number, index)


class StateFile:
    """Tensors of one dtype that are written once and read often, in a file that vanishes with the process.

    The file is read and written piece by piece and not mapped, so that it takes no memory of the process.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, folder: Path) -> None:
        """Begin an empty file in a folder; for each number it may hold tensors of these shapes."""
        self._shapes, self._dtype = shapes, dtype
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self._held: set[tuple[int, int]] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="states-")  # noqa: SIM115  # as long as this object
        self._full = False

    def has(self, number: int, index: int) -> bool:
        """Return whether tensor `index` of a number is there."""
        return (number, index) in self._held

    def write(self, number: int, index: int, tensor: Tensor) -> None:
        """Keep a tensor. Once the disk is full, neither it nor any later one is kept."""
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
        """Return a tensor that is there, in main memory."""
        found = torch.empty(self._shapes[index], dtype=self._dtype)
        content = found.view(torch.uint8).flatten().numpy().data
        done = 0
        while done < len(content):
            done += os.preadv(self._file.fileno(), [content[done:]], self._offset(number, index) + done)
        return found

    def _offset(self, number: int, index: int) -> int:
        return number * self._starts[-1] + self._starts[index]


def has_room(size: int, folder: Path) -> bool:
    """Return whether a file of so many bytes may be kept in a folder, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return size <= MOST and size <= FREE * shutil.disk_usage(there).free
