"""The one way to shuffle: by a generator that is passed."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """The items in an order that the generator gives; numpy itself would make arrays of them."""
    return (items[index] for index in generator.permutation(len(items)))
