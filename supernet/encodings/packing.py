"""Whole numbers as bit planes, and values in the places of a mask: what the encodings of candidates are made of.

Plane b holds bit b of every number, eight numbers to a byte, the first in its highest bit. Packing happens on the CPU;
unpacking on the device where the planes are, without waiting for it.
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

PIECE = 1 << 18  # of a mask, whose places are found at a time: their indices stay in the caches


def plane_bytes(count: int, bits: int) -> int:
    """What so many numbers of so many bits take."""
    return bits * (-(-count // 8))


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2 ** bits, of any shape, as bit planes: (bits, ceil(n / 8)) uint8."""
    flat = numbers.detach().to("cpu", torch.uint8 if bits <= 8 else torch.int32).flatten().numpy()
    return torch.from_numpy(np.stack([np.packbits((flat >> bit) & 1) for bit in range(bits)]))


def unpacked(planes: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed`: the numbers, uint8 of up to 8 planes and int32 of up to 16.

    Args:
        planes: (bits, ceil(n / 8)) uint8.
        shape: Of n numbers.
    """
    low = _bytes(planes[:8], prod(shape))
    numbers = low if len(planes) <= 8 else low.int() | (_bytes(planes[8:], prod(shape)).int() << 8)
    return numbers.view(*shape)


def _bytes(planes: Tensor, count: int) -> Tensor:
    """(count,) uint8 of up to 8 planes: eight of them in a word of 64 bits, which a byte of a plane is looked up as.

    On CPUs that takes less than half the time of unpacking plane by plane to bytes.
    """
    spread = _spread(planes.device)
    words = spread[0].index_select(0, planes[0].int())
    found = torch.empty_like(words) if len(planes) > 1 else words
    for bit, plane in enumerate(planes[1:], start=1):
        words |= torch.index_select(spread[bit], 0, plane.int(), out=found)
    return words.view(torch.uint8)[:count]


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """(8, 256) int64: [b, x] has the bits of the byte x as its eight bytes, each shifted to be bit b."""
    bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8))
    return torch.stack([(bits << bit).view(torch.int64).flatten() for bit in range(8)]).to(device)


def at_least(planes: Tensor, least: int) -> Tensor:
    """Whether numbers are at least `least`, which is above 0, found without unpacking them: (1, ceil(n / 8)) uint8, one
    plane.
    """
    above = torch.zeros_like(planes[0])
    equal = torch.full_like(above, 255)  # to the bits of `least - 1`, from the highest down to the one at hand
    for bit in reversed(range(len(planes))):
        if (least - 1) >> bit & 1:
            equal &= planes[bit]
        else:
            above |= equal & planes[bit]
            equal &= ~planes[bit]
    return above.unsqueeze(0)


def keeps(mask: Tensor, count: int) -> bool:
    """Whether so many are True (or not zero), as far as can be seen without waiting for a device: always, unless on the
    CPU.
    """
    return mask.device.type != "cpu" or int(np.count_nonzero(mask.numpy())) == count


def gathered(whole: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, in order: (k,)."""
    if mask.device.type != "cpu":
        return whole[mask]
    values = torch.empty(int(mask.count_nonzero()), dtype=whole.dtype)
    flat, taken = _integers(whole), _integers(values)
    for places, part in _places(mask):
        taken[part] = flat[places]
    return values


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `gathered`, zero where the mask is False.

    Args:
        values: (k,).
        mask: Bool, with k True.
    """
    whole = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    if mask.device.type != "cpu":
        return whole.masked_scatter_(mask, values)
    flat, given = _integers(whole), _integers(values)
    for places, part in _places(mask):
        flat[places] = given[part]
    return whole


def _places(mask: Tensor) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """Indices of True in a flattened mask, piece by piece, and where they stand among all of them.

    NumPy finds them without branches: gathering and scattering by index takes a quarter of the time of PyTorch's by
    mask.
    """
    flat, found = mask.numpy().reshape(-1), 0
    for start in range(0, len(flat), PIECE):
        places = np.flatnonzero(flat[start : start + PIECE])
        places += start
        yield places, slice(found, found + len(places))
        found += len(places)


def _integers(values: Tensor) -> NDArray[Any]:
    """(n,) flattened as NumPy's integers of the same size, in the same memory where contiguous: NumPy has no
    bfloat16.
    """
    return values.contiguous().view(-1).view(torch.uint8).numpy().view(f"i{values.element_size()}")
