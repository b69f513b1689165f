"""The cases that stand for a table show all that they must, and are few."""

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sampling import Case, _case, covering


def table(*sizes: int) -> list[Case]:
    return [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]


@pytest.mark.parametrize(
    ("sizes", "fewest"), [((3, 5), 5), ((7, 12), 12), ((4, 4, 4), 4), ((2, 3, 5, 3), 5), ((6,), 6)]
)
def test_every_value_is_shown_by_as_few_cases_as_can_be(sizes: tuple[int, ...], fewest: int) -> None:
    cases = table(*sizes)
    chosen = covering(cases)
    assert len(chosen) == len(set(chosen)) == fewest
    for name in cases[0]:
        assert {cases[index][name] for index in chosen} == {case[name] for case in cases}


@pytest.mark.parametrize(("sizes", "most"), [((4, 4, 4), 16), ((10, 5, 3), 52), ((2, 3, 5, 3), 18)])
def test_every_pair_of_values_is_shown(sizes: tuple[int, ...], most: int) -> None:
    cases = table(*sizes)
    chosen = covering(cases, 2)
    assert len(chosen) <= most < len(cases)
    for pair in combinations(cases[0], 2):
        shown = {tuple(cases[index][name] for name in pair) for index in chosen}
        assert shown == {tuple(case[name] for name in pair) for case in cases}


def test_what_is_not_in_the_table_is_not_asked_for() -> None:
    cases: list[Case] = [{"model": "llama", "kind": "members"}, {"model": "mamba", "kind": "weights"}]
    assert covering(cases) == covering(cases, 2) == [0, 1]
    assert covering([cases[0], cases[0]]) == [0]


def test_of_things_that_cannot_be_compared_each_is_a_value_of_its_own() -> None:
    models, dtypes = ["llama", "gpt2"], [object(), object(), object()]
    functions: list[Any] = [
        SimpleNamespace(callspec=SimpleNamespace(params={"model": model, "dtype": dtype}))
        for model, dtype in product(models, dtypes)
    ]
    assert covering([_case(function) for function in functions]) == [0, 4, 2]
