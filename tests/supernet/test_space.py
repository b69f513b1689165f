"""Units, levels and costs are exact, and survive JSON."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet.space import Level, Space, Unit, kept_counts


def unit(name: str, kept: tuple[int, ...], each: int) -> Unit:
    return Unit(name, "mlp", kept[0], tuple(Level(k, k * each) for k in kept))


SPACE = Space((unit("a", (8, 6, 3, 0), 10), unit("b", (4, 2), 7), unit("c", (5,), 11)))


@pytest.mark.parametrize(
    "levels",
    [
        pytest.param((), id="none"),
        pytest.param((Level(7, 70), Level(3, 30)), id="does not start dense"),
        pytest.param((Level(8, 80), Level(3, 80)), id="same cost"),
        pytest.param((Level(8, 80), Level(3, 90)), id="rising cost"),
    ],
)
def test_levels_start_dense_and_fall(levels: tuple[Level, ...]) -> None:
    with pytest.raises(ValueError, match="the unit: levels must start dense"):
        Unit("the unit", "mlp", 8, levels)


def test_costs() -> None:
    assert SPACE.dense_cost == 80 + 28 + 55
    assert SPACE.lowest_cost == 0 + 14 + 55
    assert SPACE.smallest_step == 14
    assert SPACE.cost((1, 1, 0)) == 60 + 14 + 55
    assert SPACE.units[0].sparsity(2) == 5 / 8
    assert Space((unit("c", (5,), 11),)).smallest_step == 0
    with pytest.raises(ValueError, match="zip"):
        SPACE.cost((0, 0))


@pytest.mark.parametrize(("kept", "level"), [(9, 0), (8, 0), (7, 0), (6, 1), (5, 1), (4, 2), (2, 2), (1, 3), (0, 3)])
def test_nearest_prefers_the_denser_of_two(kept: int, level: int) -> None:
    assert SPACE.units[0].nearest(kept) == level


def test_kept_carries_an_allocation_to_another_grid() -> None:
    assert SPACE.kept((2, 1, 0)) == {"a": 3, "b": 2, "c": 5}
    assert SPACE.nearest(SPACE.kept((2, 1, 0))) == (2, 1, 0)
    finer = Space((unit("a", (8, 7, 4, 2), 10), unit("b", (4, 3, 1), 7), unit("c", (5, 4), 11)))
    assert finer.nearest(SPACE.kept((2, 1, 0))) == (2, 1, 0)  # 3 members lie between 4 and 2, 2 between 3 and 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((unit("a", (8, 6, 3, 0), 10), unit("b", (4, 2), 7)), id="a unit less"),
        pytest.param((unit("a", (8, 6, 3, 0), 10), unit("b", (4, 1), 7), unit("c", (5,), 11)), id="another level"),
        pytest.param((unit("a", (8, 6, 3, 0), 10), unit("b", (4, 2), 8), unit("c", (5,), 11)), id="another cost"),
        pytest.param((unit("a", (8, 6, 3, 0), 10), unit("d", (4, 2), 7), unit("c", (5,), 11)), id="another name"),
    ],
)
def test_the_fingerprint_is_of_all_units_and_levels(other: tuple[Unit, ...]) -> None:
    assert Space(other).fingerprint != SPACE.fingerprint
    assert Space(SPACE.units).fingerprint == SPACE.fingerprint


def test_json_round_trip() -> None:
    again = Space.from_json(json.loads(json.dumps(SPACE.to_json())))
    assert again == SPACE
    assert again.fingerprint == SPACE.fingerprint


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(1, 500),
    sparsities=st.lists(st.floats(0, 1), max_size=9),
    multiple=st.integers(1, 64),
)
def test_kept_counts(total: int, sparsities: list[float], multiple: int) -> None:
    counts = kept_counts(total, sparsities, multiple)
    assert counts[0] == total
    assert list(counts) == sorted(set(counts), reverse=True)
    assert all(count >= 0 and count % multiple == 0 for count in counts[1:])
    for sparsity in sparsities:  # each wish is met as nearly as the multiple allows
        wish = (1 - sparsity) * total
        assert min(abs(count - wish) for count in counts) <= multiple / 2 + 1e-9


def test_counts_that_round_alike_are_merged() -> None:
    assert kept_counts(1536, [0, 0.01, 0.125, 0.13, 1.0], 32) == (1536, 1344, 0)
    assert kept_counts(3, [0, 0.125, 0.25, 0.375, 0.5], 1) == (3, 2)
    assert kept_counts(100, [0.1, 0.5], 32) == (100, 96, 64)  # 100 is no multiple, and stays
