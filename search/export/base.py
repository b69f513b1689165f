"""The seam between a run and the formats that a pruned model is written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from search.export.check import Checked, Sample
from search.inputs.models import LoadedModel
from supernet.space import Allocation
from supernet.store import Supernet

Card = Callable[[Checked | None], str]  # README.md of a folder, from what the check found


@dataclass(frozen=True)
class Pruned:
    """A pruned model, in all the forms that a format may want.

    Attributes:
        model: The assembled model, its weights `rounded` to `dtype`. This is its last use: it may be changed.
        supernet: The candidates that it was assembled from, for formats that keep codes, masks or bit widths.
        allocation: The level of each unit of the supernet.
        tokenizer: The dense model's.
        dtype: That the weights are to have in the file.
        sample: Held-out sequences with the losses that the search measured, to check with; None for no check.
        source: The dense model's folder, whose licence and tokenizer files are carried along; None where it has none.
    """

    model: PreTrainedModel
    supernet: Supernet
    allocation: Allocation
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    sample: Sample | None = None
    source: Path | None = None


class Exporter(Protocol):
    """Writes pruned models in one format. `_target_` of `export` in the configuration.

    It checks its own settings when it is made, before any work is done. A run asks `dtype_of` before it measures the
    pruned model, and calls `write` in its stage `export`, once for a folder that is not there yet, and again where a
    process was killed before it had noted that the folder is there.
    """

    @property
    def check(self) -> bool:
        """Whether what was written is loaded again: then `write` gets a sample."""
        ...

    def dtype_of(self, dense: LoadedModel) -> torch.dtype:
        """The dtype that the weights will have in the file: models are rounded to it before they are measured."""
        ...

    def write(self, pruned: Pruned, folder: Path, card: Card) -> Checked | None:
        """Write the model, its tokenizer, and the card as README.md.

        Args:
            pruned: What to write.
            folder: Where to. It appears whole or not at all, in place of an older one (`search.export.whole`).
            card: Makes README.md from what the check found.

        Returns:
            What the check found; None where there is no sample.

        Raises:
            InputError: It cannot be written, or what was written is not the model in memory.
        """
        ...
