"""Candidates of every kind come back bit for bit, and take no more room than what they say."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Generator, Tensor

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, count
from supernet.encodings.codec import decode, encode
from tests.supernet.encodings.made import (
    DTYPES,
    SHARED,
    assert_round_trip,
    assert_same,
    decoded,
    same_bits,
    some_codes,
    some_members,
    some_patterns,
    some_weights,
)

# The contract of every encoding

PATTERNS = ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (8, 16), (2, 32), (1, 64))
KINDS: dict[str, Callable[[Generator], list[Candidate]]] = {
    "refitted members": partial(some_members, refitted="all"),
    "refitted members with a bias": partial(some_members, refitted="all", bias=True, nested=False),
    "chosen members": partial(some_members, refitted="none"),
    "chosen members with a bias": partial(some_members, refitted="none", bias=True),
    "chosen members, not nested": partial(some_members, refitted="none", nested=False),
    "refitted weights": partial(some_weights, refitted="all"),
    "refitted weights, float32": partial(some_weights, refitted="all", dtype=torch.float32),
    "chosen weights": partial(some_weights, refitted="none", nested=True),
    "chosen weights, not nested": partial(some_weights, refitted="none"),
    **{f"refitted {n}:{m}": partial(some_patterns, refitted="all", patterns=[(n, m)] * 2) for n, m in PATTERNS},
    **{f"chosen {n}:{m}": partial(some_patterns, refitted="none", patterns=[(n, m)] * 2) for n, m in PATTERNS},
    "bits": partial(some_codes, symmetric=False),
    "symmetric bits": partial(some_codes, symmetric=True),
    "dropped": lambda generator: [Dropped(), Dropped()],
    "members, then dropped": lambda generator: [*some_members(generator, "all"), Dropped()],
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_kind_with_tensors = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dropped"])


def made(kind: str) -> list[Candidate]:
    return KINDS[kind](Generator().manual_seed(0))


@every_kind
def test_every_kind_comes_back_from_a_file(kind: str) -> None:
    candidates = made(kind)
    tensors = load(save(assert_round_trip(candidates)))
    for level, candidate in enumerate(candidates, start=1):
        assert_same(decoded(tensors, level), candidate)
    with pytest.raises(ValueError, match="is missing"):
        decoded(tensors, len(candidates) + 1)


@every_kind
def test_a_level_is_read_from_its_own_tensors_alone(kind: str) -> None:
    candidates = made(kind)
    tensors = encode(candidates)
    for level, candidate in enumerate(candidates, start=1):
        read: list[str] = []

        def counted(name: str, read: list[str] = read) -> Tensor:
            read.append(name)
            return tensors[name]

        before = {name: tensor.clone() for name, tensor in tensors.items()}
        assert_same(decode(counted, list(tensors), level), candidate)
        assert len(set(read)) == len(read)
        assert set(read) <= SHARED | {name for name in tensors if name.startswith(f"{level}.")}
        assert all(same_bits(tensors[name], tensor) for name, tensor in before.items())


@every_kind_with_tensors
def test_decoding_stays_on_the_device_and_does_not_wait_for_it(kind: str) -> None:
    """A tensor without storage has no values to wait for, and cannot be brought to the CPU."""
    candidates = made(kind)
    tensors = {name: tensor.to("meta") for name, tensor in encode(candidates).items()}
    for level, candidate in enumerate(candidates, start=1):
        found = decoded(tensors, level)
        for name, value in vars(candidate).items():
            got = getattr(found, name)
            if isinstance(value, Tensor):
                assert (got.device.type, got.dtype, got.shape) == ("meta", value.dtype, value.shape)
            else:
                assert got == value


def moved(candidate: Candidate, device: str) -> Candidate:
    values = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(candidate).items()}
    return type(candidate)(**values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_kind
def test_every_kind_is_decoded_on_cuda_without_waiting(kind: str) -> None:
    candidates = made(kind)
    tensors = encode([moved(candidate, "cuda") for candidate in candidates])
    assert all(same_bits(tensors[name], tensor) for name, tensor in encode(candidates).items())
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    for level, candidate in enumerate(candidates, start=1):
        decoded(there, level)  # copies tables to the device when first used
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = decoded(there, level)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(value.is_cuda for value in vars(found).values() if isinstance(value, Tensor))
        assert_same(moved(found, "cpu"), candidate)


def damages(tensor: Tensor) -> list[Tensor]:
    """Another length in every dimension, another number of dimensions, and other dtypes."""
    found = [tensor.unsqueeze(0), tensor.unsqueeze(-1)]
    for dim, length in enumerate(tensor.shape):
        shape = [*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]]
        found += [tensor.narrow(dim, 0, length - 1)] if length else []
        found.append(torch.cat([tensor, tensor.narrow(dim, length - 1, 1) if length else tensor.new_zeros(shape)], dim))
    others = (
        (torch.int64, torch.int16, torch.bool)
        if tensor.is_floating_point()
        else (torch.float32, torch.int64, torch.bool)
    )
    return found + ([tensor.to(dtype) for dtype in others] if tensor.numel() else [])


@every_kind
def test_tensors_that_do_not_fit_together_are_refused(kind: str) -> None:
    candidates = made(kind)
    tensors = encode(candidates)
    for level, candidate in enumerate(candidates, start=1):
        for name in (name for name in tensors if name.startswith(f"{level}.") or name in SHARED):
            with pytest.raises(ValueError, match=r"^tensor .* is missing$|has \d+ others"):
                decoded({key: tensor for key, tensor in tensors.items() if key != name}, level)
            for damaged in damages(tensors[name]):
                if name.endswith(("weight", "bias", "shape", "pattern")):  # what the layer's size is, the layer knows
                    assert_refused_or_of_another_size(tensors | {name: damaged}, level, candidate)
                else:
                    with pytest.raises(ValueError, match="^tensor "):
                        decoded(tensors | {name: damaged}, level)


def assert_refused_or_of_another_size(tensors: dict[str, Tensor], level: int, expected: Candidate) -> None:
    """Then the layer refuses it. Of members that are dropped at every level, there may be any number."""
    try:
        found = decoded(tensors, level)
    except ValueError:
        return
    sizes = [
        {name: value.shape for name, value in vars(one).items() if isinstance(value, Tensor)}
        for one in (found, expected)
    ]
    if sizes[0] == sizes[1]:
        assert_same(found, expected)


@every_kind
def test_a_tensor_too_many_is_refused(kind: str) -> None:
    tensors = encode(made(kind))
    for name in ("kept", "mask", "values", "weight", "bias", "zero", "dropped"):
        if f"1.{name}" not in tensors:
            with pytest.raises(ValueError, match=r"1\.contents has \d others"):
                decoded(tensors | {f"1.{name}": torch.zeros(3)}, 1)


@every_kind_with_tensors
def test_damaged_bytes_are_refused_or_make_another_whole_candidate(kind: str) -> None:
    """What they still say cannot be wrong for the level: as many are kept, with a value each, and codes have their
    width.
    """
    candidates, generator = made(kind), Generator().manual_seed(1)
    for level, candidate in enumerate(candidates, start=1):
        tensors = encode(candidates)
        for name in (
            name for name, tensor in tensors.items() if tensor.numel() and (name[0] == str(level) or name in SHARED)
        ):
            for _ in range(8):
                damaged = tensors[name].clone()
                flat = damaged.view(-1).view(torch.uint8)
                at = torch.randint(len(flat), (2,), generator=generator)
                flat[at] ^= torch.randint(1, 256, (2,), generator=generator, dtype=torch.uint8)
                try:
                    found = decoded(tensors | {name: damaged}, level)
                except ValueError:
                    continue
                assert count(found) == count(candidate)
                assert_whole(found)


def assert_whole(candidate: Candidate) -> None:
    match candidate:
        case Members():
            assert bool((candidate.kept >= 0).all()) and bool((candidate.kept.diff() > 0).all())
        case Weights():
            assert bool((candidate.mask.view(torch.uint8) <= 1).all())
            assert candidate.weight is None or same_bits(
                candidate.weight.masked_fill(~candidate.mask, 0), candidate.weight
            )
        case Quantised():
            assert int(candidate.codes.max()) < 2**candidate.bits and int(candidate.zero.max()) < 2**candidate.bits


# Round trips

SEEDS = st.integers(0, 2**32 - 1)
KEPT = st.lists(st.floats(0, 1), min_size=1, max_size=9)
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 21))


REFITTED = st.sampled_from(["all", "none", "some"])
ANY_DTYPE = st.sampled_from(DTYPES)


@settings(deadline=None, max_examples=150)
@given(
    seed=SEEDS,
    total=st.integers(1, 40),
    shares=KEPT,
    nested=st.booleans(),
    refitted=REFITTED,
    bias=st.booleans(),
    dtype=ANY_DTYPE,
)
def test_members_round_trip(seed: int, **drawn: Any) -> None:
    assert_round_trip(some_members(Generator().manual_seed(seed), **drawn))


@settings(deadline=None, max_examples=150)
@given(seed=SEEDS, shape=SHAPES, shares=KEPT, nested=st.booleans(), refitted=REFITTED, dtype=ANY_DTYPE)
def test_weights_round_trip(seed: int, **drawn: Any) -> None:
    assert_round_trip(some_weights(Generator().manual_seed(seed), **drawn))


@settings(deadline=None, max_examples=150)
@given(
    seed=SEEDS,
    d_out=st.integers(1, 9),
    groups=st.integers(1, 12),
    of=st.integers(2, 12),
    refitted=REFITTED,
    dtype=ANY_DTYPE,
)
def test_patterns_round_trip(seed: int, d_out: int, groups: int, of: int, **drawn: Any) -> None:
    patterns = [(keep, of) for keep in range(of, -1, -1)]
    assert_round_trip(
        some_patterns(Generator().manual_seed(seed), patterns=patterns, shape=(d_out, groups * of), **drawn)
    )


@settings(deadline=None, max_examples=100)
@given(
    seed=SEEDS,
    d_out=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.integers(1, 7),
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=7, unique=True),
    dtype=ANY_DTYPE,
    symmetric=st.booleans(),
)
def test_codes_round_trip(seed: int, **drawn: Any) -> None:
    assert_round_trip(some_codes(Generator().manual_seed(seed), **drawn))


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
    ranking = torch.randperm(levels + 1, generator=Generator().manual_seed(0)).view(1, -1)
    assert_round_trip([Weights(ranking > level, None) for level in range(levels)])
    assert_round_trip([Members((ranking[0] > level).nonzero().flatten(), None) for level in range(levels)])
