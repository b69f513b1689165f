"""Makes tensors that tell what they are, and checks them as they are read: headers, and bit planes with their shape.

A header is a tensor without elements. Its numbers are its own shape, which ends in a 0. So it takes no bytes in a file,
and is known without asking the device that it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from supernet.encodings.packing import packed, plane_bytes


def header(*numbers: int) -> Tensor:
    """Return a header with these numbers: uint8 of the shape (*numbers, 0)."""
    return torch.empty(*numbers, 0, dtype=torch.uint8)


def planes(name: str, numbers: Tensor, bits: int) -> dict[str, Tensor]:
    """Return whole numbers as two tensors: bit planes of this name, and a header `shape` with their bits and shape."""
    return {name: packed(numbers, bits), "shape": header(bits, *numbers.shape)}


@dataclass(frozen=True)
class Stored:
    """The stored tensors whose names begin with the same prefix, such as those of one level.

    Methods take the rest of a name. To read a tensor that is missing, or not what it should be, raises a ValueError.

    Attributes:
        read: Gives the tensor of a whole name.
        names: All whole names, also those with other prefixes.
        prefix: How the names begin.
    """

    read: Callable[[str], Tensor]
    names: Set[str]
    prefix: str

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.names

    def __len__(self) -> int:
        return sum(name.startswith(self.prefix) for name in self.names)

    def check(self, right: bool, name: str, wrong: str) -> None:
        """Raise a ValueError that says what is wrong with a tensor, unless it is right."""
        if not right:
            raise ValueError(f"tensor {self.prefix}{name} {wrong}")

    def tensor(self, name: str, dtypes: Collection[torch.dtype], dim: int) -> Tensor:
        """Read a tensor that must be of one of these dtypes and have `dim` dimensions."""
        self.check(name in self, name, "is missing")
        found = self.read(self.prefix + name)
        self.check(
            found.dtype in dtypes and found.dim() == dim, name, f"is {found.dtype} of shape {tuple(found.shape)}"
        )
        return found

    def header(self, name: str, lengths: Collection[int]) -> tuple[int, ...]:
        """Read the numbers of a header; there must be as many as one of `lengths`."""
        self.check(name in self, name, "is missing")
        shape = self.read(self.prefix + name).shape
        self.check(len(shape) - 1 in lengths and shape[-1] == 0, name, f"is no header: its shape is {tuple(shape)}")
        return tuple(shape[:-1])

    def planes(self, name: str, dims: Collection[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Read bit planes, (bits, bytes) uint8, and the shape of their numbers, whose length must be one of `dims`."""
        bits, *shape = self.header("shape", [dim + 1 for dim in dims])
        found = self.tensor(name, (torch.uint8,), 2)
        expected = bits, plane_bytes(prod(shape), 1)
        self.check(found.shape == expected and bits > 0, name, f"is of shape {tuple(found.shape)}, not {expected}")
        return found, tuple(shape)
