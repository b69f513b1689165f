"""N:M masks are found from the mask itself, and every set of a group has a rank of its own."""

from itertools import combinations
from math import comb

import pytest
import torch
from torch import Generator, Tensor

from supernet.encodings.patterns import find_pattern, mask_of, rank_bits, ranks_of


def random_mask(keep: int, of: int, shape: tuple[int, int] = (12, 192)) -> Tensor:
    scores = torch.rand(*shape, generator=Generator().manual_seed(0)).view(-1, of)
    return (scores.argsort(1).argsort(1) < keep).view(*shape)


@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (3, 4), (5, 8), (3, 16), (8, 16), (1, 64), (2, 64)])
def test_every_set_has_a_rank_of_its_own(keep: int, of: int) -> None:
    sets = torch.tensor([[i in chosen for i in range(of)] for chosen in combinations(range(of), keep)])
    ranks = ranks_of(sets, keep, of)
    assert ranks.shape == (comb(of, keep), 1)
    assert torch.equal(ranks.flatten().sort().values, torch.arange(comb(of, keep), dtype=torch.int32))
    assert rank_bits(keep, of) == max(1, int(ranks.max()).bit_length())
    assert torch.equal(mask_of(ranks, keep, of), sets)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (3, 16), (2, 3)])
def test_a_rank_that_no_set_has_is_refused(keep: int, of: int) -> None:
    ranks = torch.zeros(2, 5, dtype=torch.int32)
    ranks[1, 3] = comb(of, keep)
    with pytest.raises(ValueError, match=f"a group of {keep}:{of} has a rank above {comb(of, keep) - 1}"):
        mask_of(ranks, keep, of)


@pytest.mark.parametrize(("keep", "of"), [(0, 4), (4, 4), (1, 1), (5, 4), (1, 65), (16, 32)])
def test_patterns_without_a_packed_form_are_refused(keep: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"{keep}:{of} is no pattern"):
        rank_bits(keep, of)


@pytest.mark.parametrize(
    ("keep", "of"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8), (8, 16), (1, 3), (5, 12), (1, 64)]
)
def test_the_pattern_is_found(keep: int, of: int) -> None:
    mask = random_mask(keep, of)
    assert find_pattern(mask) == (keep, of)
    assert find_pattern(mask.T.contiguous().T) == (keep, of)
    broken = mask.clone()
    broken[-1, -1] = ~broken[-1, -1]
    assert find_pattern(broken) is None


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.rand(12, 192, generator=Generator().manual_seed(0)) < 0.5, id="random"),
        pytest.param(torch.ones(12, 192, dtype=torch.bool), id="all"),
        pytest.param(torch.zeros(12, 192, dtype=torch.bool), id="none"),
        pytest.param(random_mask(16, 32), id="too many sets"),
        pytest.param(random_mask(2, 4, (192, 12)).T, id="groups of outputs"),
        pytest.param(torch.tensor([[True, False, True]]), id="too small to gain"),
        pytest.param(torch.empty(0, 8, dtype=torch.bool), id="no outputs"),
    ],
)
def test_a_mask_without_a_pattern_has_none(mask: Tensor) -> None:
    assert find_pattern(mask) is None


def test_of_several_patterns_the_one_of_fewest_bits_is_found() -> None:
    assert find_pattern(torch.tensor([True, False, False, True] * 8).repeat(8, 1)) == (1, 2)
    assert find_pattern(torch.tensor([True, False, False] * 16).repeat(8, 1)) == (1, 3)
