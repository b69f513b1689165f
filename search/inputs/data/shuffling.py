"""The one way to shuffle, by a generator that is passed; and the one way to mix."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """The items in an order that the generator gives; numpy itself would make arrays of them."""
    return (items[index] for index in generator.permutation(len(items)))


def in_turns(texts: Sequence[Iterator[str]]) -> Iterator[str]:
    """Documents of several texts; the one that has given the fewest characters gives the next, until all have ended."""
    waiting, given = dict(enumerate(texts)), dict.fromkeys(range(len(texts)), 0)
    while waiting:
        index = min(waiting, key=given.__getitem__)
        document = next(waiting[index], None)
        if document is None:
            del waiting[index]
        else:
            given[index] += len(document)
            yield document
