"""Never worse than Týr's rule on the same statistics, and hardly more on disk than the kept values."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from local_prune.statistics import LeastSquares
from search.inputs.models import LoadedModel

MOST = 1.02  # times Týr's reconstruction error


def low_rank_inputs(tokens: int, d_in: int, seed: int) -> torch.Tensor:
    """Inputs with a spectrum that decays as that of real layers, and a few that are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -2, d_in)
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    X = torch.randn(tokens, d_in, generator=generator) * spectrum @ basis
    X[:, :3] *= 20
    return X


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("members", "width"), [(320, 1), (10, 16)], ids=["neurons", "heads"])
def test_synthetic_layers(tyr: ModuleType, members: int, width: int, seed: int) -> None:
    dense = torch.randn(48, members * width, generator=torch.Generator().manual_seed(9))
    problem = LeastSquares.zeros(members * width, 48)
    problem.add(low_rank_inputs(1500, members * width, seed))
    problem.target_own_output(dense.T)
    ratios = tyr.error_ratios(tyr.Case("synthetic", problem, dense, width, tyr.nine_levels(members)))
    assert len(ratios) == 9
    assert max(ratios) <= MOST


def test_the_rule_is_the_one_by_hand(tyr: ModuleType) -> None:
    """Two neurons of three with H = diag(3, 1, 2) scaled: scores are |G_p W_p| + W_p^2 / (2 [H^-1]_pp) = 1.5 H_pp
    W_p^2.
    """
    hessian, dense = torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.tensor([[1.0, 2.0, 1.0]])
    assert tyr.tyr_weight(hessian, dense, 2, 1, 1).tolist() == [[1.0, 2.0, 0.0]]  # energies 3, 4, 2
    assert tyr.tyr_weight(hessian, dense, 1, 1, 1).tolist() == [[0.0, 2.0, 0.0]]


@pytest.fixture(scope="module")
def smollm2_cases(tyr: ModuleType, smollm2: LoadedModel) -> Iterator[dict[str, Any]]:
    """Attention and MLP of block 2, on a few thousand tokens of real text."""
    attention, mlp = tyr.cases_of(smollm2.model, tyr.smollm2_ids(smollm2.tokenizer, 4096), [2])
    yield {"attention": attention, "mlp": mlp}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_smollm2(tyr: ModuleType, smollm2_cases: dict[str, Any], kind: str) -> None:
    case = smollm2_cases[kind]
    ratios = tyr.error_ratios(case)
    assert len(ratios) == (9 if kind == "mlp" else 8)  # nine heads: from eight to one
    assert max(ratios) <= MOST


@pytest.mark.slow
def test_files_hold_the_kept_values_and_little_else(
    tyr: ModuleType, smollm2_cases: dict[str, Any], tmp_path: Path
) -> None:
    for case in smollm2_cases.values():
        assert 1.0 <= tyr.bytes_ratio(case, tmp_path) < 1.05
