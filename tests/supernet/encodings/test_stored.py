"""What the tensors of a unit hold, and how little room they take."""

import pytest
import torch
from torch import Generator

from supernet.candidates import Dropped, Members, Quantised, Weights
from supernet.encodings.codec import encode
from tests.supernet.encodings.made import DTYPES, assert_round_trip, assert_same, decoded, patterned, size


def test_members_are_stored_as_kept_members_and_their_columns_alone() -> None:
    weight = torch.arange(12.0).view(4, 3).T  # not contiguous
    tensors = encode([Members(torch.tensor([0, 1, 4, 7]), weight), Members(torch.tensor([4]), weight[:, 2:3])])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "1.kept": (4,),
        "1.weight": (3, 4),
        "1.contents": (4, 2, 0),
        "2.kept": (1,),
        "2.weight": (3, 1),
        "2.contents": (1, 2, 0),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["1.weight"], weight)


@pytest.mark.parametrize(("levels", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (31, 5)])
def test_an_order_takes_as_many_bits_a_weight_as_tell_its_levels_apart(levels: int, bits: int) -> None:
    ranking = torch.randperm(32 * 40, generator=Generator().manual_seed(0)).view(32, 40)
    chosen = encode([Weights(ranking >= level * 30, None) for level in range(1, levels + 1)])
    assert chosen.keys() == {"order", "shape", *(f"{level}.contents" for level in range(1, levels + 1))}
    assert size(chosen) == bits * 32 * 40 // 8  # ceil(log2(levels + 1)) bits a weight for all levels together
    members = encode([Members((ranking[0] >= level * 30).nonzero().flatten(), None) for level in range(1, levels + 1)])
    assert size(members) <= bits * 40 // 8


def test_masks_that_are_not_nested_take_a_bit_a_weight_and_level() -> None:
    mask = torch.rand(32, 40, generator=Generator().manual_seed(0)) < 0.5
    assert size(encode([Weights(mask, None), Weights(~mask, None)])) == 2 * 32 * 40 // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_values_take_a_bit_a_weight_and_the_values_that_stay(dtype: torch.dtype) -> None:
    mask = torch.rand(32, 40, generator=Generator().manual_seed(0)) < 0.3
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


@pytest.mark.parametrize(
    ("pattern", "bits"), [((1, 2), 1), ((2, 4), 3), ((1, 4), 2), ((3, 4), 2), ((4, 8), 7), ((8, 16), 14)]
)
def test_patterns_take_as_many_bits_a_group_as_tell_its_sets_apart(pattern: tuple[int, int], bits: int) -> None:
    mask = patterned(*pattern, (32, 80), Generator().manual_seed(0))
    taken = bits * 32 * 80 // pattern[1] // 8
    assert size(encode([Weights(mask, None)])) == taken
    assert size(encode([Weights(mask, torch.ones(32, 80) * mask)])) == taken + 32 * 80 * pattern[0] // pattern[1] * 4


def test_levels_are_told_by_one_order_only_where_that_is_smaller() -> None:
    scores = torch.rand(32, 80, generator=Generator().manual_seed(0)).view(-1, 4)
    ranks = scores.argsort(1).argsort(1).view(32, 80)
    nested = [Weights(ranks < keep, None) for keep in (3, 2)]
    assert "order" not in assert_round_trip(nested)  # 2 and 3 bits for four weights, where an order takes 8
    assert "order" in assert_round_trip([Weights(ranks < 3, None)] * 2 + [Weights(ranks < 2, None)] * 4)
    assert "order" in assert_round_trip([Members(torch.arange(kept), None) for kept in (60, 40)])
    assert "order" not in assert_round_trip([Members(torch.tensor([999]), None)])


def test_dropped_takes_nothing() -> None:
    assert size(encode([Dropped()])) == 0


def test_what_is_stored_is_not_what_is_at_work() -> None:
    """Changing a decoded candidate changes no other level."""
    tensors = encode(
        [Weights(torch.ones(2, 3, dtype=torch.bool), None), Weights(torch.eye(2, 3, dtype=torch.bool), None)]
    )
    first = decoded(tensors, 1)
    assert isinstance(first, Weights)
    first.mask.zero_()
    assert_same(decoded(tensors, 1), Weights(torch.ones(2, 3, dtype=torch.bool), None))
