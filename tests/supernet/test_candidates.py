"""What candidates mean: how many they count, which columns are a member's, and what codes stand for."""

import pytest
import torch
from torch import Generator

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, count, member_columns

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    generator = Generator().manual_seed(0)
    codes = torch.randint(16, (3, 10), generator=generator).byte()
    scale, zero = torch.rand(3, 2, generator=generator).to(dtype), torch.randint(16, (3, 2), generator=generator).byte()
    weight = Quantised(codes, scale, zero, 4).weight
    assert (weight.dtype, weight.shape) == (dtype, codes.shape)
    for i in range(3):
        for j in range(10):
            exact = float(scale[i, j // 5]) * (int(codes[i, j]) - int(zero[i, j // 5]))
            assert float(weight[i, j]) == pytest.approx(exact, rel=float(torch.finfo(dtype).eps), abs=0)
