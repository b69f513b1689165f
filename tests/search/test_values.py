"""Sizes in bytes are read as people write them."""

from typing import Any

import pytest

from search.values import read_bytes
from supernet.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        (0, 0),
        (123, 123),
        ("5kB", 5_000),
        ("4GB", 4_000_000_000),
        ("1.5 MB", 1_500_000),
        ("512MiB", 512 << 20),
        ("2 GiB", 2 << 30),
        ("1TB", 10**12),
        ("800KB", 800_000),
        ("800 kB", 800_000),
        ("8KiB", 8192),
    ],
)
def test_sizes_are_numbers_with_or_without_a_unit(text: Any, size: int | None) -> None:
    assert read_bytes("evaluator.memory", text) == size


@pytest.mark.parametrize("text", [-1, 1.5, True, "4", "4 apples", "GB", "-4GB", "4gb"])
def test_anything_else_is_told_with_an_example(text: Any) -> None:
    with pytest.raises(InputError, match=r"evaluator\.memory=.*is not a size; use .* such as 4GB or 512MiB"):
        read_bytes("evaluator.memory", text)
