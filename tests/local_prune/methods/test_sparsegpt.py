"""SparseGPT and APT against the algorithm as it is written, and against least squares on the data, in float64."""

import logging
from collections.abc import Callable
from itertools import combinations
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from local_prune.methods import apt
from local_prune.methods.apt import AptPruner, joint_errors, keep_least_loss, solve_jointly
from local_prune.methods.shared import blockwise
from local_prune.methods.shared.blockwise import keep_largest, quotas, sweep
from local_prune.methods.sparsegpt import STEP, SparseGptPruner, solve_columns
from local_prune.pruner import Task
from supernet.errors import InputError
from supernet.models.prunables import Pattern

MakeLayer = Callable[..., Any]
DAMPING = 0.01


# Blockwise methods, in float64, on the data A, B of the damped problem (see `Layer.augmented`).


def factor_of_inverse(A: Tensor) -> Tensor:
    return torch.linalg.cholesky((A.T @ A).inverse(), upper=True)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Flat indices of the lowest scores."""
    return scores.flatten().argsort()[:count]


def textbook_sparsegpt(W: Tensor, U: Tensor, kept: int, block: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper as it is written, one column and one level at a time: mask and weights (d_out, d_in)."""
    W, mask, given = W.clone(), torch.ones_like(W, dtype=torch.bool), 0
    d_out, d_in = W.shape
    for first in range(0, d_in, block):
        last = min(first + block, d_in)
        if pattern is None:
            scores = W[:, first:last] ** 2 / U.diagonal()[first:last] ** 2
            stay = kept * last // d_in - given
            given += stay
            removed = lowest(scores, scores.numel() - stay)
            mask[:, first:last] = (
                torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, removed, False).view_as(scores)
            )
        for j in range(first, last):
            if pattern is not None and j % pattern.of == 0:
                group = slice(j, j + pattern.of)
                scores = W[:, group] ** 2 / U.diagonal()[group] ** 2
                for row in range(d_out):
                    mask[row, j + lowest(scores[row], pattern.of - pattern.keep)] = False
            error = W[:, j] / U[j, j] * ~mask[:, j]
            W[:, j:] -= error.unsqueeze(1) * U[j, j:]
            W[~mask[:, j], j] = 0.0
    return mask, W


def damped_case(layer: MakeLayer, **settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, the optimum W (d_in, d_out), and U."""
    A, B = layer(**settings).augmented(DAMPING)
    return A, B, torch.linalg.lstsq(A, B).solution, factor_of_inverse(A)


@pytest.mark.parametrize(
    ("d_in", "block"), [(40, 40), (2 * STEP + 9, 2 * STEP + 9), (70, 30), (71, STEP), (12, 1)], ids=str
)
def test_sparsegpt_is_the_textbook_loop(layer: MakeLayer, d_in: int, block: int) -> None:
    _, _, W, U = damped_case(layer, members=d_in, d_out=5, tokens=3 * d_in, shift=1.0)
    kept = [5 * d_in - 1, 4 * d_in, 2 * d_in + 3, d_in, 0]
    masks, weights = sweep(W, U, torch.zeros(d_in, dtype=torch.bool), kept, None, block, solve_columns)
    for level, count in enumerate(kept):
        mask, weight = textbook_sparsegpt(W.T, U, count, block, None)
        assert torch.equal(masks[:, level].T, mask)
        torch.testing.assert_close(weights[:, level].T, weight)


@pytest.mark.parametrize(
    ("texts", "block"), [(("3:4", "2:4", "1:4"), 24), (("5:8", "2:8"), 16), (("20:24",), 24), (("1:3",), 3)], ids=str
)
def test_sparsegpt_with_patterns_is_the_textbook_loop(layer: MakeLayer, texts: tuple[str, ...], block: int) -> None:
    patterns = [Pattern.parse(text) for text in texts]
    _, _, W, U = damped_case(layer, members=48, d_out=5, shift=1.0)
    kept = [pattern.keep for pattern in patterns]
    masks, weights = sweep(W, U, torch.zeros(48, dtype=torch.bool), kept, patterns[0].of, block, solve_columns)
    for level, pattern in enumerate(patterns):
        mask, weight = textbook_sparsegpt(W.T, U, 0, 48, pattern)
        assert torch.equal(masks[:, level].T, mask)
        torch.testing.assert_close(weights[:, level].T, weight)


def constrained(A: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """argmin ||A w - target|| over w that is zero where it is not free: (d,)."""
    solution = torch.zeros(A.shape[1], dtype=A.dtype)
    if free.any():
        solution[free] = torch.linalg.lstsq(A[:, free], target.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return solution


def joint_block(A: Tensor, target: Tensor, w: Tensor, first: int, stays: Tensor) -> Tensor:
    """The best weights of a row from column `first` on, those before it fixed, with some of the next ones removed."""
    right = A[:, first:]
    free = torch.ones(right.shape[1], dtype=torch.bool)
    free[: len(stays)] = stays
    return torch.cat([w[:first], constrained(right, target - A[:, :first] @ w[:first], free)])


def best_of_group(A: Tensor, target: Tensor, w: Tensor, first: int, group: int, pattern: Pattern) -> Tensor:
    """What of a group of a row is to stay, of all choices, if nothing else of the block from `first` on goes: (of,)
    bool.
    """
    losses = []
    for stays in combinations(range(pattern.of), pattern.keep):
        choice = torch.ones(group - first + pattern.of, dtype=torch.bool)
        choice[group - first :] = torch.isin(torch.arange(pattern.of), torch.tensor(stays))
        change = A @ (joint_block(A, target, w, first, choice) - w)
        losses.append((float(change.square().sum()), choice[group - first :]))
    return min(losses, key=lambda loss: loss[0])[1]


def joint_sweep(A: Tensor, B: Tensor, kept: int, block: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """The multiple-removal problem by least squares on the data, a row and a block at a time: mask and weights (d_out,
    d_in).
    """
    d_in, d_out, given = A.shape[1], B.shape[1], 0
    W = torch.linalg.lstsq(A, B).solution.T.contiguous()
    mask = torch.ones_like(W, dtype=torch.bool)
    for first in range(0, d_in, block):
        last = min(first + block, d_in)
        inverse = (A[:, first:].T @ A[:, first:]).inverse()
        if pattern is None:
            stay = kept * last // d_in - given
            given += stay
            scores = W[:, first:last] ** 2 / inverse.diagonal()[: last - first]
            removed = lowest(scores, scores.numel() - stay)
            mask[:, first:last] = (
                torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, removed, False).view_as(scores)
            )
        for row in range(d_out):
            for group in range(first, last, pattern.of) if pattern else ():
                mask[row, group : group + pattern.of] = best_of_group(A, B[:, row], W[row], first, group, pattern)
            W[row] = joint_block(A, B[:, row], W[row], first, mask[row, first:last])
    return mask, W


@pytest.mark.parametrize(("d_in", "block"), [(24, 24), (26, 10), (9, 1)], ids=str)
def test_apt_is_the_constrained_least_squares_solution(layer: MakeLayer, d_in: int, block: int) -> None:
    A, B, W, U = damped_case(layer, members=d_in, d_out=4, tokens=100, shift=1.0)
    kept = [4 * d_in - 1, 3 * d_in, d_in + 2, 0]
    masks, weights = sweep(W, U, torch.zeros(d_in, dtype=torch.bool), kept, None, block, solve_jointly)
    for level, count in enumerate(kept):
        mask, weight = joint_sweep(A, B, count, block, None)
        assert torch.equal(masks[:, level].T, mask)
        torch.testing.assert_close(weights[:, level].T, weight)


@pytest.mark.parametrize(("texts", "block"), [(("3:4", "2:4", "1:4"), 8), (("2:3",), 6)], ids=str)
def test_apt_chooses_the_best_of_each_group(layer: MakeLayer, texts: tuple[str, ...], block: int) -> None:
    patterns = [Pattern.parse(text) for text in texts]
    A, B, W, U = damped_case(layer, members=12, d_out=4, tokens=60, shift=1.0)
    kept = [pattern.keep for pattern in patterns]
    masks, weights = sweep(W, U, torch.zeros(12, dtype=torch.bool), kept, patterns[0].of, block, solve_jointly)
    for level, pattern in enumerate(patterns):
        mask, weight = joint_sweep(A, B, 0, block, pattern)
        assert torch.equal(masks[:, level].T, mask)
        torch.testing.assert_close(weights[:, level].T, weight)


def test_apt_falls_back_to_single_scores_where_subsets_are_many(layer: MakeLayer) -> None:
    _, _, W, U = damped_case(layer, members=32, d_out=4)
    masks, _ = sweep(W, U, torch.zeros(32, dtype=torch.bool), [8], 16, 32, solve_jointly)
    scores = (W.square() / (U.T @ U).diagonal().unsqueeze(1)).view(2, 16, 4)
    assert torch.equal(masks.view(2, 16, 4), scores >= scores.sort(1).values[:, 8:9])


def test_the_least_loss_of_a_group_is_found(layer: MakeLayer) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    A, W = root @ root.T, torch.randn(8, 20, generator=generator, dtype=torch.float64)
    stays = keep_least_loss(W, A, 4)
    for column in range(20):
        losses = {}
        for removed in combinations(range(8), 4):
            P, w = list(removed), W[list(removed), column]
            losses[removed] = float(w @ A[P][:, P].inverse() @ w)
        assert tuple((~stays[:, column]).nonzero().flatten().tolist()) == min(losses, key=lambda P: losses[P])


def test_joint_errors_do_not_depend_on_how_systems_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(9, 9, generator=generator, dtype=torch.float64).triu() + 4 * torch.eye(9)
    W = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    removed = torch.rand(9, 30, generator=generator) < torch.linspace(0, 1, 30)
    together = joint_errors(W, U, removed)
    monkeypatch.setattr(apt, "SYSTEMS", 1)
    torch.testing.assert_close(joint_errors(W, U, removed), together)
    left = W - U.T @ together
    assert left[removed].abs().max() < 1e-12


# Counts.

TIED = st.lists(st.integers(0, 3), min_size=12, max_size=12)


@given(st.lists(TIED, min_size=1, max_size=3), st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_so_many_of_the_largest_stay(values: list[list[int]], data: st.DataObject, dtype: torch.dtype) -> None:
    scores = torch.tensor(values, dtype=dtype).view(len(values), 3, 4).permute(1, 0, 2).contiguous() / 3 + 1.0
    kept = [data.draw(st.integers(0, 12)) for _ in values]
    mask = keep_largest(scores, kept)
    for level, count in enumerate(kept):
        chosen, others = scores[:, level][mask[:, level]], scores[:, level][~mask[:, level]]
        assert len(chosen) == count
        assert not len(chosen) or not len(others) or chosen.min() >= others.max()


def test_the_largest_are_told_apart_to_the_last_bit() -> None:
    one = torch.ones(1)
    scores = torch.cat([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one), one]).view(2, 1, 2)
    assert keep_largest(scores, [1]).flatten().tolist() == [False, True, False, False]
    assert keep_largest(scores, [3]).flatten().tolist() == [True, True, False, True]
    tiny = torch.tensor([0.0, 1e-45, 3e38, 1e-30]).view(1, 1, 4)
    assert keep_largest(tiny, [3]).flatten().tolist() == [False, True, True, True]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9), st.data())
def test_blocks_share_what_is_kept(dead: list[bool], d_out: int, block: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, d_out * len(dead)))
    flags = torch.tensor(dead)
    parts = quotas(kept, d_out, flags, block)
    living = [d_out * int((~part).sum()) for part in flags.split(block)]
    assert sum(parts) == kept
    assert all(0 <= part <= d_out * len(f) for part, f in zip(parts, flags.split(block), strict=True))
    if kept <= sum(living):
        assert all(part <= most for part, most in zip(parts, living, strict=True))
        assert all(abs(part - kept * most / max(1, sum(living))) < 1 for part, most in zip(parts, living, strict=True))


@pytest.mark.parametrize("solve", [solve_columns, solve_jointly], ids=["sparsegpt", "apt"])
def test_candidates_are_those_of_the_damped_problem(layer: MakeLayer, solve: Any) -> None:
    case = layer(members=40, shift=1.0)
    A, B = case.augmented(0.05)
    W, U, kept = torch.linalg.lstsq(A, B).solution, factor_of_inverse(A), [200, 101, 30]
    pruner = (SparseGptPruner if solve is solve_columns else AptPruner)(damping=0.05, block=16, refit=0)
    masks, weights = sweep(W, U, torch.zeros(40, dtype=torch.bool), kept, None, 16, solve)
    for level, candidate in enumerate(pruner.candidates(Task("unit", case.dense, case.problem), kept)):
        assert torch.equal(candidate.mask, masks[:, level].T)
        torch.testing.assert_close(candidate.weight.double(), weights[:, level].T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [SparseGptPruner, AptPruner])
def test_a_singular_problem_is_named(kind: type[Any], layer: MakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(blockwise, "sweep", fail)
    case, pruner = layer(), kind()
    with pytest.raises(
        InputError, match=r"^unit: the Hessian is not positive definite even with damping 1000; use more calib"
    ):
        pruner.candidates(Task("unit", case.dense, case.problem), [12])


@pytest.mark.parametrize("kind", [SparseGptPruner, AptPruner])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_singular_problems_are_damped_until_they_are_solved(
    kind: type[Any], pattern: str | None, layer: MakeLayer, caplog: pytest.LogCaptureFixture
) -> None:
    case = layer(members=72, tokens=10)
    with caplog.at_level(logging.WARNING):
        (found,) = kind(pattern, damping=1e-7).candidates(case.task, [216])
    assert any("damping raised from 1e-07" in record.getMessage() for record in caplog.records)
    assert found.weight.isfinite().all()
    assert case.error(torch.arange(72), found.weight) <= 1.0
