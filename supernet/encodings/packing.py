"""Packs whole numbers into bit planes, and gathers values by a mask: what the encodings of candidates are made of.

Plane b holds bit b of every number: eight numbers to a byte, the first of them in its highest bit. Numbers are packed
on the CPU, and unpacked on the device where the planes are, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# How many numbers of a mask are looked at together: few enough that the indices of the True ones stay in the caches.
PIECE = 1 << 18


def plane_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` numbers of `bits` bits take as bit planes."""
    return bits * (-(-count // 8))


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack n whole numbers below 2 ** bits, of any shape, into bit planes: (bits, ceil(n / 8)) uint8."""
    flat = numbers.detach().to("cpu", torch.uint8 if bits <= 8 else torch.int32).flatten().numpy()
    return torch.from_numpy(np.stack([np.packbits((flat >> bit) & 1) for bit in range(bits)]))


def unpacked(planes: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack bit planes, as `packed` makes them.

    Args:
        planes: (bits, ceil(n / 8)) uint8.
        shape: The shape of the n numbers.

    Returns:
        The numbers, uint8 for up to 8 planes and int32 for up to 16.
    """
    low = _bytes(planes[:8], prod(shape))
    numbers = low if len(planes) <= 8 else low.int() | (_bytes(planes[8:], prod(shape)).int() << 8)
    return numbers.view(*shape)


def _bytes(planes: Tensor, count: int) -> Tensor:
    """Return the numbers of up to 8 planes, (count,) uint8.

    Each byte of a plane is looked up as a word of 64 bits, which holds that bit of eight numbers, one in each of its
    bytes. On CPUs that takes less than half the time of unpacking plane by plane to bytes.
    """
    spread = _spread(planes.device)
    words = spread[0].index_select(0, planes[0].int())
    found = torch.empty_like(words) if len(planes) > 1 else words
    for bit, plane in enumerate(planes[1:], start=1):
        words |= torch.index_select(spread[bit], 0, plane.int(), out=found)
    return words.view(torch.uint8)[:count]


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """Return the words to look up, (8, 256) int64: the eight bytes of [b, x] have the bits of the byte x at bit b."""
    bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8))
    return torch.stack([(bits << bit).view(torch.int64).flatten() for bit in range(8)]).to(device)


def at_least(planes: Tensor, least: int) -> Tensor:
    """Compare numbers with `least`, without unpacking them.

    Args:
        planes: The numbers' bit planes, (bits, ceil(n / 8)) uint8.
        least: The number to compare with, above 0.

    Returns:
        One bit plane, (1, ceil(n / 8)) uint8, with a 1 for each number that is at least `least`.
    """
    above = torch.zeros_like(planes[0])
    equal = torch.full_like(above, 255)  # which numbers equal `least - 1` in all bits down to the one at hand
    for bit in reversed(range(len(planes))):
        if (least - 1) >> bit & 1:
            equal &= planes[bit]
        else:
            above |= equal & planes[bit]
            equal &= ~planes[bit]
    return above.unsqueeze(0)


def keeps(mask: Tensor, count: int) -> bool:
    """Return whether `count` numbers of a mask are True (or not zero).

    This is only checked on the CPU. On other devices the answer is always yes, as one would have to wait for them.
    """
    return mask.device.type != "cpu" or int(np.count_nonzero(mask.numpy())) == count


def gathered(whole: Tensor, mask: Tensor) -> Tensor:
    """Return the values (k,) where a mask is True, in their order."""
    if mask.device.type != "cpu":
        return whole[mask]
    values = torch.empty(int(mask.count_nonzero()), dtype=whole.dtype)
    flat, taken = _integers(whole), _integers(values)
    for indices, part in _true_indices(mask):
        taken[part] = flat[indices]
    return values


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Put values, as `gathered` gives them, back where a mask is True; the result is zero elsewhere.

    Args:
        values: (k,), of any dtype.
        mask: Bool of any shape, True at k places.
    """
    whole = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    if mask.device.type != "cpu":
        return whole.masked_scatter_(mask, values)
    flat, given = _integers(whole), _integers(values)
    for indices, part in _true_indices(mask):
        flat[indices] = given[part]
    return whole


def _true_indices(mask: Tensor) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """Yield, piece by piece, the indices where a flattened mask is True, and their place among all such indices.

    NumPy finds indices without branches: with them, to gather and scatter takes a quarter of the time that PyTorch
    takes with the mask.
    """
    flat, found = mask.numpy().reshape(-1), 0
    for start in range(0, len(flat), PIECE):
        indices = np.flatnonzero(flat[start : start + PIECE])
        indices += start
        yield indices, slice(found, found + len(indices))
        found += len(indices)


def _integers(values: Tensor) -> NDArray[Any]:
    """Return a flattened tensor as integers of the same size in NumPy, (n,), which has no bfloat16.

    They share the tensor's memory if it is contiguous.
    """
    return values.contiguous().view(-1).view(torch.uint8).numpy().view(f"i{values.element_size()}")
