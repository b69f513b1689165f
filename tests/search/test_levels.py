"""Grids of levels: coarse first, then half as wide around what was found; mixtures weigh what levels keep."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.levels import Grid, Mixture, exact
from search.models import LoadedModel, random_llama
from supernet.architecture import ATTENTION, MLP, SubBlock, sub_blocks
from supernet.errors import InputError
from supernet.space import Space


@pytest.fixture(scope="module")
def parts() -> tuple[SubBlock, ...]:
    """Two blocks of 4 KV groups and 256 neurons."""
    loaded: LoadedModel = random_llama(0, 64, 256, 2, 8, 4, dtype=torch.float32)
    return sub_blocks(loaded.model)


def counts(space: Space, kind: str) -> list[int]:
    (levels,) = {unit.levels for unit in space.units if unit.kind == kind}
    return [level.kept for level in levels]


def all_kept(parts: tuple[SubBlock, ...], attention: int, mlp: int) -> dict[str, int]:
    return {part.name: attention if part.kind == ATTENTION else mlp for part in parts}


def weights_of(mixture: Mixture, space: Space, kind: str) -> tuple[float, ...]:
    (weights,) = {mixture[unit.name] for unit in space.units if unit.kind == kind}
    return weights


def test_the_first_grid_covers_everything(parts: tuple[SubBlock, ...]) -> None:
    space, mixture = Grid(9, 0.125, 32).first(parts)
    assert counts(space, ATTENTION) == [4, 3, 2, 1, 0]  # more levels than groups are merged
    assert counts(space, MLP) == [256, 224, 192, 160, 128, 96, 64, 32, 0]
    assert [unit.name for unit in space.units] == [part.name for part in parts] == list(mixture)
    assert weights_of(mixture, space, ATTENTION) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_sparsities_end_at_one(parts: tuple[SubBlock, ...]) -> None:
    space, _ = Grid(9, 0.3, 32).first(parts)
    assert counts(space, MLP) == [256, 192, 96, 32, 0]  # 0.3, 0.6, 0.9, then 1


def test_later_grids_halve_the_spacing_around_what_was_found(parts: tuple[SubBlock, ...]) -> None:
    grid, kept = Grid(5, 0.25, 1), all_kept(parts, 2, 128)
    for refinement, spacing in ((1, 32), (2, 16), (3, 8)):
        space, mixture = grid.around(parts, kept, refinement)
        window = [128 + k * spacing for k in (2, 1, 0, -1, -2)]
        assert counts(space, MLP) == [256, *window]  # every unit has its dense level, too
        expected = [0.0, *(count / sum(window) for count in window)]  # which is not in the window
        assert weights_of(mixture, space, MLP) == pytest.approx(expected)


def test_a_window_at_the_dense_end_counts_the_dense_level(parts: tuple[SubBlock, ...]) -> None:
    space, mixture = Grid(5, 0.25, 32).around(parts, all_kept(parts, 4, 224), 1)
    assert counts(space, MLP) == [256, 224, 192, 160]
    assert weights_of(mixture, space, MLP) == pytest.approx([256 / 832, 224 / 832, 192 / 832, 160 / 832])


def test_a_window_at_the_other_end_holds_nothing_but_sparse_levels(parts: tuple[SubBlock, ...]) -> None:
    space, mixture = Grid(5, 0.25, 32).around(parts, all_kept(parts, 0, 0), 1)
    assert counts(space, MLP) == [256, 64, 32, 0]
    assert weights_of(mixture, space, MLP) == pytest.approx([0.0, 2 / 3, 1 / 3, 0.0])
    narrow, mixture = Grid(2, 0.125, 32).around(parts, all_kept(parts, 0, 0), 3)
    assert counts(narrow, MLP) == [256, 0]
    assert weights_of(mixture, narrow, MLP) == (0.0, 1.0)  # the next sub-block sees that this one is gone


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    levels=st.integers(2, 17),
    step=st.floats(0.01, 0.99),
    multiple=st.sampled_from([1, 32, 48, 256]),
    refinement=st.integers(0, 4),
    choice=st.randoms(use_true_random=False),
)
def test_every_round_offers_what_was_found(
    parts: tuple[SubBlock, ...], levels: int, step: float, multiple: int, refinement: int, choice: object
) -> None:
    grid = Grid(levels, step, multiple)
    first, mixture = grid.first(parts)
    allocation = [choice.randrange(len(unit.levels)) for unit in first.units]  # type: ignore[attr-defined]
    kept = first.kept(allocation)
    space, finer = grid.around(parts, kept, refinement)
    assert space.kept(space.nearest(kept)) == kept
    for grid_space, weights in ((first, mixture), (space, finer)):
        assert_is_a_mixture(grid_space, weights)
        for unit in grid_space.units:
            assert len(unit.levels) <= levels + 2
            assert unit.kind == ATTENTION or all(level.kept % multiple == 0 for level in unit.levels[1:])


def assert_is_a_mixture(space: Space, mixture: Mapping[str, tuple[float, ...]]) -> None:
    for unit in space.units:
        weights = mixture[unit.name]
        assert len(weights) == len(unit.levels)
        assert min(weights) >= 0
        assert sum(weights) == pytest.approx(1)


def test_the_last_rebuild_has_one_allocation_to_choose(parts: tuple[SubBlock, ...]) -> None:
    kept = dict(zip((part.name for part in parts), (4, 96, 0, 256), strict=True))
    space, mixture = exact(parts, kept)
    assert [[level.kept for level in unit.levels] for unit in space.units] == [[4], [256, 96], [4, 0], [256]]
    assert list(mixture.values()) == [(1.0,), (0.0, 1.0), (0.0, 1.0), (1.0,)]
    assert space.kept([len(unit.levels) - 1 for unit in space.units]) == kept


@pytest.mark.parametrize(("levels", "step"), [(1, 0.125), (0, 0.125), (9, 0.0), (9, 1.0), (9, -0.5)])
def test_impossible_grids_are_refused(levels: int, step: float) -> None:
    with pytest.raises(InputError, match=rf"supernet\.levels={levels} must be .*supernet\.step={step} .*9 levels of 0\.125"):
        Grid(levels, step, 32)


def test_an_impossible_multiple_is_refused(parts: tuple[SubBlock, ...]) -> None:
    with pytest.raises(InputError, match=r"prune\.multiple=512"):
        Grid(9, 0.125, 512).first(parts)
