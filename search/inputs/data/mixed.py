"""Mixes several texts, which then count as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from search.inputs.data.named import check_name, source_named
from search.inputs.data.shuffling import in_turns
from search.inputs.data.sources import PARTS, TextSource
from search.inputs.models.loaded import LoadedModel
from supernet.errors import InputError


@dataclass(frozen=True)
class MixedText:
    """Documents of several texts, about as many characters of each, for the calibration; the first text for the rest.

    A mixture harms least where weights are refitted to it; what is searched and measured on can be of one kind, which
    need not be written first.

    Attributes:
        texts: Names of texts of `conf/data`, files or folders.
        sources: The texts' sources, which the names stand for.
    """

    texts: Sequence[str]
    sources: Sequence[TextSource] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not self.texts:
            raise InputError(f"data.source.texts={self.texts} must be a list of texts, such as [prose,generated]")
        for name in self.texts:
            check_name(name, "data.source.texts")

    @property
    def splits(self) -> Mapping[str, str]:
        """All texts feed the calibration, and the first one the other parts."""
        return dict.fromkeys(PARTS, "first") | {"calibration": "all"}

    def for_model(self, loaded: LoadedModel, device: torch.device, writes: bool = True) -> MixedText:
        """Return the same mixture with the texts' sources, for the model."""
        return replace(self, sources=[source_named(name).for_model(loaded, device, writes) for name in self.texts])

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The texts' documents; the text that has given the fewest characters gives the next."""
        if split == "first":
            return _texts(self.sources[0], seed)
        # Another order than that in which the other parts are given the first text: what they have is passed over here.
        other = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
        return in_turns([_texts(source, other if index == 0 else seed) for index, source in enumerate(self.sources)])


def _texts(source: TextSource, seed: int) -> Iterator[str]:
    """The documents that feed a source's calibration."""
    for document in source.documents(source.splits["calibration"], seed):
        if not isinstance(document, str):
            raise InputError(f"{document.where}: chats cannot be mixed with other texts; take texts alone")
        yield document
