"""Least-squares problems to prune, with the data they come from."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from local_prune.statistics import LeastSquares
from supernet.encoding import Candidate, member_columns


@dataclass(frozen=True)
class Layer:
    """A linear layer with its calibration data.

    Attributes:
        X: (tokens, d_in) float64.
        T: (tokens, d_out) float64, what the kept weights are fitted to.
        dense: (d_out, d_in).
        width: Columns per member.
        problem: The sums over X and T.
    """

    X: Tensor
    T: Tensor
    dense: Tensor
    width: int
    problem: LeastSquares

    @property
    def members(self) -> int:
        return self.dense.shape[1] // self.width

    def error(self, columns: Tensor, weight: Tensor) -> float:
        """||X_k W_k^T - T||^2 / ||T||^2 in float64, for a weight (d_out, k)."""
        residual = self.X[:, columns] @ weight.double().T - self.T
        return float(residual.square().sum() / self.T.square().sum())

    def error_of(self, candidate: Candidate) -> float:
        return self.error(member_columns(candidate.kept, self.width), candidate.weight)

    def least_error(self, kept: Tensor) -> float:
        """What no weights of these members can go below."""
        columns = member_columns(kept, self.width)
        return self.error(columns, torch.linalg.lstsq(self.X[:, columns], self.T, driver="gelsd").solution.T)

    def augmented(self, damping: float) -> tuple[Tensor, Tensor]:
        """(A, B) in float64 with `||A W - B||^2 = ||X W - T||^2 + ridge ||W - W_dense||^2`: damping as rows of data."""
        ridge = (damping * self.X.square().sum(0).mean()).sqrt()
        d_in = self.X.shape[1]
        anchor = self.dense.double().T * (self.X.abs().sum(0) > 0).unsqueeze(1)
        return torch.cat([self.X, ridge * torch.eye(d_in)]), torch.cat([self.T, ridge * anchor])


def make_layer(
    members: int = 24,
    width: int = 1,
    d_out: int = 6,
    tokens: int = 200,
    seed: int = 0,
    dead: tuple[int, ...] = (),
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """Inputs that are correlated and differ in size, as those of real layers.

    Args:
        dead: Inputs that are always 0.
        shift: How far the target is from the layer's own output.
        dtype: Of the dense weight.
    """
    generator = torch.Generator().manual_seed(seed)
    d_in = members * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(d_in, dtype=torch.float64) + 0.5 * normal(d_in, d_in) / d_in**0.5
    X = (normal(tokens, d_in) * (0.3 + normal(d_in).abs())) @ mixing
    X[:, list(dead)] = 0.0
    X = X.float().double()  # what the statistics see, too
    dense = normal(d_out, d_in).to(dtype)
    T = (X @ dense.double().T + shift * normal(tokens, d_out)).float().double()
    problem = LeastSquares.zeros(d_in, d_out)
    for part in torch.arange(tokens).split(77):
        problem.add(X[part], T[part])
    return Layer(X, T, dense, width, problem)


@pytest.fixture(scope="session")
def layer() -> Callable[..., Layer]:
    """Makes a `Layer`; see `make_layer` for what can be chosen."""
    return make_layer


@pytest.fixture(scope="session")
def tyr() -> ModuleType:
    """The benchmark against Týr's rule, where the rule is written down."""
    path = Path(__file__).parents[1] / "benchmarks" / "tyr.py"
    spec = importlib.util.spec_from_file_location("benchmark_tyr", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module
