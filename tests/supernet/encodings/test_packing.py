"""Bit planes hold every whole number, can be compared without unpacking, and masks give back what was taken through
them.
"""

import pytest
import torch
from torch import Generator

from supernet.encodings import packing
from supernet.encodings.packing import at_least, gathered, keeps, packed, plane_bytes, scattered, unpacked


def test_bit_planes_hold_every_whole_number() -> None:
    values = torch.arange(256, dtype=torch.uint8)[:251]
    planes = packed(values, 8)
    assert planes.shape == (8, 32)
    assert torch.equal(unpacked(planes, [251]), values)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 7), (5, 16)])
def test_any_width_and_shape_comes_back(bits: int, shape: tuple[int, ...]) -> None:
    values = torch.randint(2**bits, shape, generator=Generator().manual_seed(bits))
    planes = packed(values, bits)
    assert (planes.dtype, planes.nbytes) == (torch.uint8, plane_bytes(values.numel(), bits))
    found = unpacked(planes, shape)
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(found.long(), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_are_compared_without_unpacking(bits: int) -> None:
    values = torch.randint(2**bits, (101,), generator=Generator().manual_seed(bits))
    planes = packed(values, bits)
    for least in range(1, 2**bits):
        assert torch.equal(unpacked(at_least(planes, least), [101]).bool(), values >= least)
    assert torch.equal(planes, packed(values, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mask_gives_back_what_was_taken_through_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float
) -> None:
    monkeypatch.setattr(packing, "PIECE", 64)
    generator = Generator().manual_seed(0)
    mask = torch.rand(13, 21, generator=generator) < share
    whole = torch.randn(13, 21, generator=generator).to(dtype)
    values = gathered(whole, mask)
    assert torch.equal(values, whole[mask])
    assert torch.equal(gathered(whole.T.contiguous().T, mask), values)
    found = scattered(values, mask)
    assert found.dtype == dtype
    assert torch.equal(found, whole * mask)
    assert keeps(mask, len(values))
    assert not keeps(mask, len(values) + 1)
