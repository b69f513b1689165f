"""Candidates of every kind, at levels of rising sparsity, and whether they come back as they were."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from supernet.candidates import Candidate, Members, Quantised, Weights
from supernet.encodings.codec import decode, encode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARED = {"order", "shape"}  # tensors that all levels need


def decoded(tensors: dict[str, Tensor], level: int) -> Candidate:
    return decode(tensors.__getitem__, list(tensors), level)


def same_bits(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors are alike in dtype, shape and every bit: zeros have signs, and NaN is not NaN."""
    if found is None or expected is None:
        return found is expected
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(
        found.contiguous().flatten().view(torch.uint8), expected.contiguous().flatten().view(torch.uint8)
    )


def assert_same(found: Candidate, expected: Candidate) -> None:
    assert type(found) is type(expected)
    for name, value in vars(expected).items():
        got = getattr(found, name)
        assert same_bits(got, value) if isinstance(value, Tensor) or value is None else got == value, name


def assert_round_trip(candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    tensors = encode(candidates)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors.values())
    for level, candidate in enumerate(candidates, start=1):
        assert_same(decoded(tensors, level), candidate)
    return tensors


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes of what is stored, without names and shapes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: Generator) -> Tensor:
    """Any floats that there are, with infinities, NaN and zeros of both signs."""
    length = int(torch.tensor(shape).prod()) * dtype.itemsize
    return torch.randint(256, (length,), generator=generator, dtype=torch.uint8).view(dtype).view(*shape)


D_OUT, WIDTH = 6, 3


def has_weight(refitted: str, level: int) -> bool:
    return refitted == "all" or (refitted == "some" and level % 2 == 0)


def some_members(
    generator: Generator,
    refitted: str,
    bias: bool = False,
    nested: bool = True,
    total: int = 16,
    shares: Sequence[float] = (0.6, 0.3, 0.15),
    dtype: torch.dtype = torch.bfloat16,
) -> list[Candidate]:
    ranking, made = torch.randperm(total, generator=generator), list[Candidate]()
    for level, share in enumerate(sorted(shares, reverse=True)):
        ranking = ranking if nested else torch.randperm(total, generator=generator)
        kept = ranking[: round(share * total)].sort().values
        weight = random_bits((D_OUT, len(kept) * WIDTH), dtype, generator) if has_weight(refitted, level) else None
        made.append(Members(kept, weight, random_bits((D_OUT,), dtype, generator) if bias else None))
    return made


def with_masks(generator: Generator, masks: Sequence[Tensor], refitted: str, dtype: torch.dtype) -> list[Candidate]:
    made = list[Candidate]()
    for level, mask in enumerate(masks):
        weight = (
            random_bits(mask.shape, dtype, generator).masked_fill(~mask, 0) if has_weight(refitted, level) else None
        )
        made.append(Weights(mask, weight))
    return made


def some_weights(
    generator: Generator,
    refitted: str,
    nested: bool = False,
    shape: tuple[int, int] = (D_OUT, 64),
    shares: Sequence[float] = (0.7, 0.4, 0.1),
    dtype: torch.dtype = torch.bfloat16,
) -> list[Candidate]:
    scores, masks = torch.rand(shape, generator=generator), []
    for share in sorted(shares, reverse=True):
        scores = scores if nested else torch.rand(shape, generator=generator)
        masks.append(scores < (2.0 if share == 1 else share))
    return with_masks(generator, masks, refitted, dtype)


def patterned(keep: int, of: int, shape: tuple[int, int], generator: Generator) -> Tensor:
    """A random mask."""
    scores = torch.rand(*shape, generator=generator).view(-1, of)
    return (scores.argsort(1).argsort(1) < keep).view(*shape)


def some_patterns(
    generator: Generator,
    refitted: str,
    patterns: Sequence[tuple[int, int]],
    shape: tuple[int, int] = (D_OUT, 64),
    dtype: torch.dtype = torch.bfloat16,
) -> list[Candidate]:
    return with_masks(generator, [patterned(*pattern, shape, generator) for pattern in patterns], refitted, dtype)


def some_codes(
    generator: Generator,
    symmetric: bool,
    d_out: int = D_OUT,
    groups: int = 4,
    group: int = 16,
    bits: Sequence[int] = range(2, 9),
    dtype: torch.dtype = torch.float16,
) -> list[Candidate]:
    made = list[Candidate]()
    for width in sorted(bits, reverse=True):
        codes, zero = (
            torch.randint(2**width, (d_out, size), generator=generator).byte() for size in (groups * group, groups)
        )
        zero = torch.full_like(zero, 2 ** (width - 1)) if symmetric else zero
        made.append(Quantised(codes, random_bits((d_out, groups), dtype, generator), zero, width))
    return made
