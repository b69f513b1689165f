"""Candidates of every kind come back bit for bit, and take no more room than what they say."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from supernet import encoding
from supernet.encoding import Candidate, Dropped, Members, Quantised, Weights, count, decode, encode, member_columns, moved

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decoded(tensors: dict[str, Tensor], level: int) -> Candidate:
    return decode(tensors.__getitem__, list(tensors), level)


def same_bits(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors are alike in dtype, shape and every bit: zeros have signs, and NaN is not NaN."""
    if found is None or expected is None:
        return found is expected
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.contiguous().flatten().view(torch.uint8), expected.contiguous().flatten().view(torch.uint8))


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
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("shape"))


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any floats that there are, with infinities, NaN and zeros of both signs."""
    length = int(torch.tensor(shape).prod()) * dtype.itemsize
    return torch.randint(256, (length,), generator=generator, dtype=torch.uint8).view(dtype).view(*shape)


# Round trips

SEEDS = st.integers(0, 2**32 - 1)
KEPT = st.lists(st.floats(0, 1), min_size=1, max_size=9)
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 21))


@settings(deadline=None, max_examples=150)
@given(
    seed=SEEDS,
    total=st.integers(1, 40),
    shares=KEPT,
    nested=st.booleans(),
    with_weight=st.sampled_from(["all", "none", "some"]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_members_round_trip(
    seed: int, total: int, shares: list[float], nested: bool, with_weight: str, with_bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranking, d_out, width = torch.randperm(total, generator=generator), 5, 3
    candidates = []
    for level, share in enumerate(sorted(shares, reverse=True)):
        if not nested:
            ranking = torch.randperm(total, generator=generator)
        kept = ranking[: round(share * total)].sort().values
        has_weight = with_weight == "all" or (with_weight == "some" and level % 2 == 0)
        weight = random_bits((d_out, len(kept) * width), dtype, generator) if has_weight else None
        candidates.append(Members(kept, weight, random_bits((d_out,), dtype, generator) if with_bias else None))
    assert_round_trip(candidates)


@settings(deadline=None, max_examples=150)
@given(
    seed=SEEDS,
    shape=SHAPES,
    shares=KEPT,
    nested=st.booleans(),
    with_weight=st.sampled_from(["all", "none", "some"]),
    dtype=st.sampled_from(DTYPES),
)
def test_weights_round_trip(
    seed: int, shape: tuple[int, int], shares: list[float], nested: bool, with_weight: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator)
    candidates = []
    for level, share in enumerate(sorted(shares, reverse=True)):
        if not nested:
            scores = torch.rand(shape, generator=generator)
        mask = scores < (2.0 if share == 1 else share)
        has_weight = with_weight == "all" or (with_weight == "some" and level % 2 == 0)
        weight = random_bits(shape, dtype, generator).masked_fill(~mask, 0) if has_weight else None
        candidates.append(Weights(mask, weight))
    assert_round_trip(candidates)


@settings(deadline=None, max_examples=100)
@given(
    seed=SEEDS,
    d_out=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.integers(1, 7),
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=7, unique=True),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
)
def test_codes_round_trip(
    seed: int, d_out: int, groups: int, group: int, bits: list[int], dtype: torch.dtype, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    candidates: list[Candidate] = []
    for width in sorted(bits, reverse=True):
        codes, zero = (
            torch.randint(2**width, (d_out, columns), generator=generator).byte() for columns in (groups * group, groups)
        )
        if symmetric:
            zero.fill_(2 ** (width - 1))
        candidates.append(Quantised(codes, random_bits((d_out, groups), dtype, generator), zero, width))
    assert_round_trip(candidates)


@pytest.mark.parametrize(
    "candidates",
    [
        pytest.param([Dropped()], id="dropped"),
        pytest.param([Dropped(), Dropped()], id="dropped twice"),
        pytest.param([Members(torch.arange(3), None), Dropped()], id="members, then dropped"),
        pytest.param([Members(torch.arange(0), None), Members(torch.arange(0), None)], id="no members at any level"),
        pytest.param([Members(torch.arange(0), torch.empty(4, 0))], id="no members, and their weights"),
        pytest.param([Members(torch.arange(7), None)], id="all members"),
        pytest.param([Weights(torch.zeros(3, 5, dtype=torch.bool), None)], id="no weights"),
        pytest.param([Weights(torch.ones(3, 5, dtype=torch.bool), None)] * 2, id="all weights, twice"),
        pytest.param([Weights(torch.ones(3, 5, dtype=torch.bool), torch.full((3, 5), -0.0))], id="negative zeros"),
        pytest.param([Weights(torch.eye(3, dtype=torch.bool), torch.eye(3).T)], id="not contiguous"),
    ],
)
def test_extremes_round_trip(candidates: list[Candidate]) -> None:
    assert_round_trip(candidates)


def test_no_levels_take_no_room() -> None:
    assert encode([]) == {}


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7, 8, 254, 255, 256, 300])
def test_any_number_of_levels_round_trips(levels: int) -> None:
    ranking = torch.randperm(levels + 1, generator=torch.Generator().manual_seed(0)).view(1, -1)
    assert_round_trip([Weights(ranking > level, None) for level in range(levels)])
    assert_round_trip([Members((ranking[0] > level).nonzero().flatten(), None) for level in range(levels)])


def test_a_level_is_decoded_from_its_own_tensors_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates = [Members(torch.arange(kept), torch.randn(4, kept, generator=generator), torch.randn(4)) for kept in (3, 2, 1)]
    tensors = encode(candidates)
    read: list[str] = []

    def counted(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    assert_same(decode(counted, list(tensors), 2), candidates[1])
    assert sorted(read) == ["2.bias", "2.kept", "2.weight"]


# What is stored


def test_members_are_stored_as_kept_members_and_their_columns_alone() -> None:
    weight = torch.arange(12.0).view(4, 3).T  # not contiguous
    tensors = encode([Members(torch.tensor([0, 1, 4, 7]), weight), Members(torch.tensor([4]), weight[:, 2:3])])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "1.kept": (4,),
        "1.weight": (3, 4),
        "2.kept": (1,),
        "2.weight": (3, 1),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["1.weight"], weight)


@pytest.mark.parametrize(("levels", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (31, 5)])
def test_an_order_takes_as_many_bits_a_weight_as_tell_its_levels_apart(levels: int, bits: int) -> None:
    ranking = torch.randperm(32 * 40, generator=torch.Generator().manual_seed(0)).view(32, 40)
    weights = encode([Weights(ranking >= level * 30, None) for level in range(1, levels + 1)])
    assert weights.keys() == {"order", "shape"}
    assert size(weights) == bits * 32 * 40 // 8  # ceil(log2(levels + 1)) bits a weight for all levels together
    members = encode([Members((ranking[0] >= level * 30).nonzero().flatten(), None) for level in range(1, levels + 1)])
    assert size(members) <= bits * 40 // 8


def test_masks_that_are_not_nested_take_a_bit_a_weight_and_level() -> None:
    mask = torch.rand(32, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    assert size(encode([Weights(mask, None), Weights(~mask, None)])) == 2 * 32 * 40 // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_values_take_a_bit_a_weight_and_the_values_that_stay(dtype: torch.dtype) -> None:
    mask = torch.rand(32, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    weight = torch.ones(32, 40, dtype=dtype) * mask
    assert size(encode([Weights(mask, weight)])) == 32 * 40 // 8 + int(mask.sum()) * dtype.itemsize


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_their_width(bits: int) -> None:
    codes = torch.full((16, 64), 2**bits - 1, dtype=torch.uint8)
    scale, zero = torch.ones(16, 4, dtype=torch.bfloat16), torch.zeros(16, 4, dtype=torch.uint8)
    tensors = encode([Quantised(codes, scale, zero, bits)])
    assert size(tensors) == bits * 16 * 64 // 8 + 16 * 4 * (2 + 1)  # with a scale and a zero for each group
    symmetric = encode([Quantised(codes, scale, torch.full_like(zero, 2 ** (bits - 1)), bits)])
    assert size(symmetric) == bits * 16 * 64 // 8 + 16 * 4 * 2  # zeros in the middle go without saying


def test_dropped_takes_nothing() -> None:
    assert size(encode([Dropped()])) == 0


# What candidates mean


@pytest.mark.parametrize(
    ("kept", "width", "columns"),
    [
        ([0, 2, 5], 1, [0, 2, 5]),
        ([1, 3], 3, [3, 4, 5, 9, 10, 11]),
        ([], 4, []),
    ],
)
def test_member_columns(kept: list[int], width: int, columns: list[int]) -> None:
    found = member_columns(torch.tensor(kept, dtype=torch.int64), width)
    assert found.tolist() == columns
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("candidate", "counted"),
    [
        (Members(torch.tensor([1, 5, 6]), None), 3),
        (Weights(torch.tensor([[True, False], [True, True]]), None), 3),
        (Quantised(torch.zeros(2, 4).byte(), torch.ones(2, 2), torch.zeros(2, 2).byte(), 5), 5),
        (Dropped(), 0),
    ],
)
def test_levels_count_what_is_kept(candidate: Candidate, counted: int) -> None:
    assert count(candidate) == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_stand_for_steps_from_the_code_of_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (3, 10), generator=generator).byte()
    scale, zero = torch.rand(3, 2, generator=generator).to(dtype), torch.randint(16, (3, 2), generator=generator).byte()
    weight = Quantised(codes, scale, zero, 4).weight
    assert (weight.dtype, weight.shape) == (dtype, codes.shape)
    for i in range(3):
        for j in range(10):
            exact = float(scale[i, j // 5]) * (int(codes[i, j]) - int(zero[i, j // 5]))
            assert float(weight[i, j]) == pytest.approx(exact, rel=float(torch.finfo(dtype).eps), abs=0)


def test_moved_keeps_everything() -> None:
    for candidate in (
        Members(torch.arange(3), torch.randn(2, 3), None),
        Weights(torch.eye(2, dtype=torch.bool), None),
        Quantised(torch.zeros(2, 4).byte(), torch.ones(2, 2), torch.zeros(2, 2).byte(), 5),
        Dropped(),
    ):
        assert_same(moved(candidate, "cpu"), candidate)
        there = moved(candidate, "meta")
        assert all(value.device.type == "meta" for value in vars(there).values() if isinstance(value, Tensor))


def test_what_is_stored_is_not_what_is_at_work() -> None:
    """Changing a decoded candidate changes no other level."""
    tensors = encode([Weights(torch.ones(2, 3, dtype=torch.bool), None), Weights(torch.eye(2, 3, dtype=torch.bool), None)])
    first = decoded(tensors, 1)
    assert isinstance(first, Weights)
    first.mask.zero_()
    assert_same(decoded(tensors, 1), Weights(torch.ones(2, 3, dtype=torch.bool), None))


def test_bit_planes_hold_every_whole_number() -> None:
    values = torch.arange(256, dtype=torch.uint8)[:251]
    planes = encoding._packed(values, 8)
    assert planes.shape == (8, 32)
    assert torch.equal(encoding._unpacked(planes, torch.tensor([251])), values)
