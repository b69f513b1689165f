"""Whole numbers as bit planes, and values gathered by a mask: what the encodings of candidates are made of.

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

# Numbers of a mask that are looked at together: the indices of those that are True stay in the caches.
PIECE = 1 << 18


def plane_bytes(count: int, bits: int) -> int:
    """Bytes of `count` numbers of `bits` bits as bit planes."""
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
    """The numbers of up to 8 planes, (count,) uint8.

    A byte of a plane is looked up as a word of 64 bits, which holds that bit of eight numbers. On CPUs that takes less
    than half the time of unpacking plane by plane to bytes.
    """
    spread = _spread(planes.device)
    words = spread[0].index_select(0, planes[0].int())
    found = torch.empty_like(words) if len(planes) > 1 else words
    for bit, plane in enumerate(planes[1:], start=1):
        words |= torch.index_select(spread[bit], 0, plane.int(), out=found)
    return words.view(torch.uint8)[:count]


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """The words to look up, (8, 256) int64: [b, x] has the bits of the byte x as its eight bytes, each at bit b."""
    bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8))
    return torch.stack([(bits << bit).view(torch.int64).flatten() for bit in range(8)]).to(device)


def at_least(planes: Tensor, least: int) -> Tensor:
    """Whether numbers are at least `least`, found without unpacking them.

    Args:
        planes: The numbers' bit planes, (bits, ceil(n / 8)) uint8.
        least: Above 0.

    Returns:
        One bit plane, (1, ceil(n / 8)) uint8.
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
    """Whether `count` numbers of a mask are True (or not zero).

    That is only looked at on the CPU. On other devices it would mean to wait for them, so the answer is yes.
    """
    return mask.device.type != "cpu" or int(np.count_nonzero(mask.numpy())) == count


def gathered(whole: Tensor, mask: Tensor) -> Tensor:
    """The values where a mask is True, in order: (k,)."""
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
        values: (k,).
        mask: Bool of any shape, with k True.
    """
    whole = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    if mask.device.type != "cpu":
        return whole.masked_scatter_(mask, values)
    flat, given = _integers(whole), _integers(values)
    for indices, part in _true_indices(mask):
        flat[indices] = given[part]
    return whole


def _true_indices(mask: Tensor) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """Where a flattened mask is True, piece by piece: the indices, and where they stand among all indices.

    NumPy finds them without branches: gathering and scattering by index takes a quarter of the time that PyTorch takes
    by mask.
    """
    flat, found = mask.numpy().reshape(-1), 0
    for start in range(0, len(flat), PIECE):
        indices = np.flatnonzero(flat[start : start + PIECE])
        indices += start
        yield indices, slice(found, found + len(indices))
        found += len(indices)


def _integers(values: Tensor) -> NDArray[Any]:
    """A flattened tensor as NumPy's integers of the same size, (n,), as NumPy has no bfloat16.

    The memory is the same where the tensor is contiguous.
    """
    return values.contiguous().view(-1).view(torch.uint8).numpy().view(f"i{values.element_size()}")
