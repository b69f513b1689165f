"""Conjugate gradients on the weights that stay: towards the least-squares optimum of each output, and never away from
it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from local_prune.methods.apt import AptPruner
from local_prune.methods.shared.refit import refit
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.pruner import Task
from supernet.errors import InputError

MakeLayer = Callable[..., Any]
DAMPING = 0.01


def problem(
    layer: MakeLayer, levels: int = 3, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The damped problem's data A, B, its Hessian and solution, random masks and what is left of the solution:
    float64.
    """
    case = layer(members=20, d_out=5, **settings)
    A, B = case.augmented(DAMPING)
    H, solution = A.T @ A, torch.linalg.lstsq(A, B).solution
    mask = (
        torch.rand(20, levels, 5, generator=torch.Generator().manual_seed(0))
        < torch.tensor([0.7, 0.4, 0.1])[:levels, None]
    )
    mask[:, -1, 0] = False  # an output of which nothing stays
    return A, B, H, solution, mask, solution.unsqueeze(1) * mask


def losses(A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """||A W - B||^2 of every level and output."""
    return (torch.einsum("td,dlo->tlo", A, weights) - B.unsqueeze(1)).square().sum(0)


def test_enough_steps_reach_the_optimum(layer: MakeLayer) -> None:
    A, B, H, solution, mask, weights = problem(layer)
    refit(H, solution, mask, weights, 60)
    for level in range(mask.shape[1]):
        for output in range(mask.shape[2]):
            chosen = mask[:, level, output]
            expected = torch.linalg.lstsq(A[:, chosen], B[:, output : output + 1]).solution.flatten()
            torch.testing.assert_close(weights[chosen, level, output], expected, rtol=1e-6, atol=1e-8)


def test_each_step_lowers_the_loss_of_each_output(layer: MakeLayer) -> None:
    A, B, H, solution, mask, weights = problem(layer, shift=1.0)
    before = losses(A, B, weights)
    for steps in range(1, 5):
        after = losses(A, B, refit(H, solution, mask, weights.clone(), steps))
        assert (after <= before * (1 + 1e-9)).all()
        assert after.sum() < before.sum()
        before = after


def test_removed_weights_stay_removed_and_no_steps_change_nothing(layer: MakeLayer) -> None:
    _, _, H, solution, mask, weights = problem(layer, dead=(3, 7))
    assert torch.equal(refit(H, solution, mask, weights.clone(), 0), weights)
    changed = refit(H, solution, mask, weights.clone(), 4)
    assert not changed[~mask].any() and changed.isfinite().all()
    solved = solution.unsqueeze(1).repeat(1, 3, 1)
    torch.testing.assert_close(refit(H, solution, torch.ones_like(mask), solved.clone(), 4), solved)


@pytest.mark.parametrize("pruner", [SparseGptPruner, AptPruner])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_pruners_keep_their_masks_and_lose_less(layer: MakeLayer, pruner: Any, pattern: str | None) -> None:
    case = layer(members=64, d_out=12, tokens=300)
    kept = [12 * 32] if pattern else [12 * 40, 12 * 16]
    task = Task("unit", case.dense, case.problem)
    published = pruner(pattern, block=16, refit=0).candidates(task, kept)
    refitted = pruner(pattern, block=16, refit=4).candidates(task, kept)
    columns = torch.arange(64)
    for before, after in zip(published, refitted, strict=True):
        assert torch.equal(before.mask, after.mask)
        assert case.error(columns, after.weight) < 0.98 * case.error(columns, before.weight)


def test_steps_below_zero_are_refused() -> None:
    with pytest.raises(InputError, match=r"prune\.pruner\.refit=-1"):
        SparseGptPruner(refit=-1)
