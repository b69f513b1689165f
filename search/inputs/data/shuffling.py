"""The one way to shuffle: with a random generator that the caller passes."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """Yield the items in an order drawn from the generator. (numpy's own shuffling would turn them into arrays.)"""
    return (items[index] for index in generator.permutation(len(items)))
