"""A model may be sparse before it is pruned: its zeros go first and stay zero at every level, or it is told that they
do not.
"""

import logging
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.apt import AptPruner, keep_least_loss
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.magnitude import MagnitudePruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.rtn import RtnPruner
from local_prune.methods.shared.blockwise import quotas
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.methods.wanda_sp import WandaSpPruner
from local_prune.pruner import Pruner, Task
from local_prune.statistics import LeastSquares, Moments
from supernet.candidates import Candidate, Quantised, Weights
from supernet.store import Supernet

OUT, IN = 24, 32
WHOLE: dict[str, Any] = {  # compared over the whole layer or its blocks
    "sparsegpt": SparseGptPruner(block=8),
    "sparsegpt as published": SparseGptPruner(block=8, refit=0),
    "apt": AptPruner(block=8),
    "magnitude": MagnitudePruner(),
}
ROWS: dict[str, Any] = {"wanda": WandaPruner(), "gblm": GblmPruner()}
PATTERNS: dict[str, Any] = {
    f"{kind.name} {pattern}": kind(pattern)
    for kind in (SparseGptPruner, AptPruner, MagnitudePruner, WandaPruner, GblmPruner)
    for pattern in ("2:4", "3:8")
}
GRIDS: dict[str, Any] = {
    "rtn": RtnPruner([6, 2], 8),
    "rtn symmetric": RtnPruner([6, 2], 8, symmetric=True),
    "gptq": GptqPruner([6, 2], 8),
    "gptq symmetric": GptqPruner([6, 2], 8, symmetric=True),
    "gptq as it comes": GptqPruner([6, 2], 8, activation_order=False, block=16),
}


def sparse_task(pruner: Pruner, dtype: torch.dtype = torch.float32) -> Task:
    """A layer with 70 % zeros, an input that is always 0, and a target that is not its own output: a fit would fill the
    zeros.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    X[:, 3] = 0.0
    dense = torch.randn(OUT, IN, generator=generator).to(dtype)
    dense[torch.rand(OUT, IN, generator=generator) < 0.7] = 0.0
    problem, moments = LeastSquares.zeros(IN, OUT), Moments.zeros(IN)
    problem.add(X, X @ dense.float().T + torch.randn(300, OUT, generator=generator))
    moments.add(X)
    statistics = problem if isinstance(pruner.statistics(dense, 1), LeastSquares) else moments
    return Task("layer", dense, statistics, torch.rand(OUT, IN, generator=generator))


def weight_of(candidate: Candidate, dense: Tensor) -> Tensor:
    if isinstance(candidate, Quantised):
        groups = candidate.codes.float().view(
            OUT, -1, IN // candidate.scale.shape[1]
        ) - candidate.zero.float().unsqueeze(2)
        return (groups * candidate.scale.float().unsqueeze(2)).view(OUT, IN)
    assert isinstance(candidate, Weights)
    weight = dense * candidate.mask if candidate.weight is None else candidate.weight
    assert not weight[~candidate.mask].any()
    return weight.float()


@pytest.mark.parametrize("name", WHOLE | ROWS)
def test_zeros_go_first(name: str) -> None:
    pruner = (WHOLE | ROWS)[name]
    task = sparse_task(pruner)
    valued = task.dense != 0
    # where weights of an input that is always 0 become 0, and so no better
    if isinstance(task.statistics, LeastSquares):
        valued &= torch.arange(IN) != 3
    counts = [OUT * IN * 3 // 4, OUT * IN // 2, int((task.dense != 0).sum()), OUT * IN // 8]
    for kept, candidate in zip(counts, pruner.candidates(task, counts), strict=True):
        assert isinstance(candidate, Weights) and int(candidate.mask.sum()) == kept
        weight = weight_of(candidate, task.dense)
        assert not weight[task.dense == 0].any()
        for mine, rows in [(kept, slice(None))] if name in WHOLE else [(kept // OUT, row) for row in range(OUT)]:
            least = min(mine, int(valued[rows].sum()))
            assert int((candidate.mask & valued)[rows].sum()) >= least
            assert int((weight != 0)[rows].sum()) >= least


@pytest.mark.parametrize("name", PATTERNS)
def test_zeros_go_first_in_every_group_of_a_pattern(name: str) -> None:
    pruner = PATTERNS[name]
    task, pattern = sparse_task(pruner), pruner.patterns[0]
    (candidate,) = pruner.candidates(task, [pattern.kept(OUT * IN)])
    groups = candidate.mask.view(OUT, -1, pattern.of)
    assert (groups.sum(2) == pattern.keep).all()
    weight = weight_of(candidate, task.dense)
    assert not weight[task.dense == 0].any()
    living = ((task.dense != 0) & (torch.arange(IN) != 3)).view(groups.shape)
    some = slice(1, None)  # but for the group of the input that is always 0
    assert ((groups & living).sum(2) == living.sum(2).clamp_max(pattern.keep))[:, some].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_zeros_stay_on_grids(name: str, dtype: torch.dtype) -> None:
    pruner = GRIDS[name]
    task = sparse_task(pruner, dtype)
    for candidate in pruner.candidates(task, [6, 2]):
        weight = weight_of(candidate, task.dense)
        assert not weight[task.dense == 0].any()
        assert int((weight != 0).sum()) > 0.4 * int((task.dense != 0).sum())


@pytest.mark.parametrize("kind", [SparseGptPruner, AptPruner])
def test_what_stays_is_fitted_with_the_zeros_where_they_are(kind: type[Any]) -> None:
    """Each output is the least-squares solution on its own non-zero weights, if all of them may stay."""
    pruner = kind(block=8, refit=80, damping=0.1)
    task = sparse_task(pruner)
    assert isinstance(task.statistics, LeastSquares)
    (candidate,) = pruner.candidates(task, [OUT * IN // 2])
    problem = task.statistics
    H = problem.hessian.double()
    ridge = 0.1 * float(H.diagonal().mean())
    anchor = task.dense.double().T * (H.diagonal() > 0).unsqueeze(1)
    H, G = H + ridge * torch.eye(IN), problem.moment.double() + ridge * anchor
    for output in range(OUT):
        free = task.dense[output] != 0
        expected = torch.cholesky_solve(G[free, output : output + 1], torch.linalg.cholesky(H[free][:, free])).flatten()
        torch.testing.assert_close(candidate.weight[output, free].double(), expected, rtol=1e-3, atol=1e-4)


def test_of_the_choices_with_all_zeros_among_the_removed_the_best_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 6, generator=generator)
    A, group, zero = (
        root.T @ root,
        torch.randn(6, 50, generator=generator),
        torch.rand(6, 50, generator=generator) < 0.35,
    )
    stays = keep_least_loss(group, A, 3, zero)
    different = keep_least_loss(group, A, 3)
    assert not torch.equal(stays, different)  # zeros are not what costs least here
    for one in range(50):
        losses = {}
        for removed in combinations(range(6), 3):
            P = list(removed)
            if int(zero[P, one].sum()) == min(3, int(zero[:, one].sum())):
                w = group[P, one]
                losses[removed] = float(
                    w @ torch.cholesky_solve(w.unsqueeze(1), torch.linalg.cholesky(A[P][:, P])).flatten()
                )
        assert tuple((~stays[:, one]).nonzero().flatten().tolist()) == min(losses, key=lambda P: losses[P])


def test_blocks_keep_what_is_not_zero_in_proportion_and_zeros_last() -> None:
    zero = torch.zeros(8, 10, dtype=torch.bool)
    zero[:4, :8] = True
    dead = torch.tensor([False] * 7 + [True])
    assert quotas(38, 10, dead, 4, zero) == [8, 30]
    assert quotas(19, 10, dead, 4, zero) == [4, 15]
    assert quotas(48, 10, dead, 4, zero) == [8, 40]
    assert quotas(64, 10, dead, 4, zero) == [24, 40]
    assert quotas(64, 10, dead, 4) == quotas(64, 10, dead, 4, torch.zeros_like(zero))


def sparse_model(model_of: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = model_of("llama")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter[torch.rand(parameter.shape, generator=generator) < 0.7] = 0.0
    return model


@pytest.mark.parametrize(
    ("pruner", "told"),
    [
        (
            SparseGptPruner(),
            r"^(69|70)\.\d% of the weights to prune are zero already: they go first and stay zero at every",
        ),
        (
            ObsPruner(multiple=8),
            r"are zero already, and will not be: prune=obs fits all weights of what it keeps",
        ),
        (WandaSpPruner(multiple=8), None),
    ],
    ids=["weights", "fitted members", "members"],
)
def test_a_build_says_what_becomes_of_zeros(
    model_of: Callable[..., PreTrainedModel],
    tmp_path: Path,
    built: Callable[..., Supernet],
    ids: Tensor,
    caplog: pytest.LogCaptureFixture,
    pruner: Pruner,
    told: str | None,
) -> None:
    with caplog.at_level(logging.WARNING):
        supernet = built(sparse_model(model_of), tmp_path, pruner, ids, kept=(0.5,))
        built(model_of("llama"), tmp_path / "dense", pruner, ids, kept=(0.5,))
    assert len(caplog.messages) == (told is not None)
    if told:
        assert re.search(told, caplog.messages[0])
    assert supernet.complete
