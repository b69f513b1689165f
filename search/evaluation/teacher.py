"""Keeps the dense model's side of the sequences that have been measured: in main memory up to a limit, then in files.

For each token that is its final hidden state, its expected embedding in float32 and one number: 25 GB for 512 sequences
of 2,048 tokens of Llama-3.1-8B. It is computed once for a sequence, and needed again at every comparison on it. What
comes back from a file is what was put there, bit for bit, so no result depends on the limit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from local_prune.text.activations import Activations
from search.evaluation.fitness import Targets


class TeacherTargets:
    """Holds targets by the number of their sequence.

    Its files have no name in the folder any more, so they vanish with the process, however it ends.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            limit: The most bytes of main memory to take.
            folder: Where the files with all that exceeds the limit go; None for the system's folder of temporary files.
        """
        self.limit, self.in_memory, self.in_files = limit, 0, 0
        self._folder = folder
        self._known: dict[int, Targets] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._known

    def __getitem__(self, sequence: int) -> Targets:
        """Return the targets of a sequence, in main memory or mapped from a file. They must not be changed."""
        return self._known[sequence]

    def add(self, sequence: int, targets: Targets) -> None:
        """Keep the targets of a sequence, which may be on any device."""
        size = targets.hidden.nbytes + targets.expected.nbytes + targets.normaliser.nbytes
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            self._known[sequence] = targets.to("cpu")
        else:
            self.in_files += size
            self._known[sequence] = _filed(targets, size, self._folder or Path(tempfile.gettempdir()))


def _filed(targets: Targets, size: int, folder: Path) -> Targets:
    """Return the same targets in a file that is mapped into memory; `size` is what they take, in bytes."""
    space = Activations([(size,)], torch.uint8, in_memory=False, folder=folder)[0]
    start, views = 0, list[Tensor]()
    # Those in float32 go first, so that each begins at a multiple of its item size.
    for tensor in (targets.expected, targets.normaliser, targets.hidden):
        view = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append(view.copy_(tensor))
        start += tensor.nbytes
    return Targets(views[2], views[0], views[1])
