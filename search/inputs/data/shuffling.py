"""Shuffles documents, by a random generator that the caller passes, and mixes those of several texts."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """Yield the items in an order drawn from the generator. (numpy's own shuffling would turn them into arrays.)"""
    return (items[index] for index in generator.permutation(len(items)))


def in_turns(texts: Sequence[Iterator[str]]) -> Iterator[str]:
    """Yield the documents of several texts, the next one always from the text that has given the fewest characters."""
    waiting, given = dict(enumerate(texts)), dict.fromkeys(range(len(texts)), 0)
    while waiting:
        index = min(waiting, key=given.__getitem__)
        document = next(waiting[index], None)
        if document is None:
            del waiting[index]
        else:
            given[index] += len(document)
            yield document
