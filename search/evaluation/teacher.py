"""The dense model's side of the sequences that have been measured, kept within a limit of main memory and beyond it in
files.

A token takes its final hidden state, its expected embedding in float32 and one number: 25 GB for 512 sequences of 2,048
tokens of Llama-3.1-8B. They are computed once a sequence and needed again at every comparison on it. What comes back
from a file is what was put there, bit for bit, so no result depends on the limit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from local_prune.text.activations import Activations
from search.evaluation.fitness import Targets


class TeacherTargets:
    """Targets by the number of their sequence. Files are unlinked: they vanish with the process, however it ends."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            limit: Bytes of main memory to take at most.
            folder: Where the files of all that exceeds it go; None for the system's folder of temporary files.
        """
        self.limit, self.in_memory, self.in_files = limit, 0, 0
        self._folder = folder
        self._known: dict[int, Targets] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._known

    def __getitem__(self, sequence: int) -> Targets:
        """Those of a sequence, in main memory or mapped from a file; not to be changed."""
        return self._known[sequence]

    def add(self, sequence: int, targets: Targets) -> None:
        """Keep those of a sequence, from any device."""
        size = targets.hidden.nbytes + targets.expected.nbytes + targets.normaliser.nbytes
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            self._known[sequence] = targets.to("cpu")
        else:
            self.in_files += size
            self._known[sequence] = _filed(targets, size, self._folder or Path(tempfile.gettempdir()))


def _filed(targets: Targets, size: int, folder: Path) -> Targets:
    """The same in a file that is mapped into memory."""
    space = Activations([(size,)], torch.uint8, in_memory=False, folder=folder)[0]
    start, views = 0, list[Tensor]()
    # float32 first: each begins where its dtype may
    for tensor in (targets.expected, targets.normaliser, targets.hidden):
        view = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append(view.copy_(tensor))
        start += tensor.nbytes
    return Targets(views[2], views[0], views[1])
