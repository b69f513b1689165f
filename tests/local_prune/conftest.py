"""Least-squares problems to prune, with the data they come from, and supernets built by any pruner."""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, Pruner, Task
from local_prune.statistics import LeastSquares
from local_prune.walk import build
from supernet.candidates import Members, member_columns
from supernet.models.architecture import sub_blocks
from supernet.space import Level, Space, Unit
from supernet.store import Supernet


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

    @property
    def task(self) -> Task:
        """What a pruner is given."""
        return Task("unit", self.dense, self.problem, width=self.width)

    def error_of(self, candidate: Members) -> float:
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


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """No progress bar."""
    return items


def space_for(model: PreTrainedModel, pruner: Pruner, kept: Sequence[float]) -> Space:
    """The units of a pruner, each with all of its members and with these fractions of them, or with the levels that
    there are.
    """
    units = []
    for one in pruner.prunables(sub_blocks(model)):
        counts = (one.total, *(round(fraction * one.total) for fraction in kept))
        units.append(Unit(one.name, one.kind, one.total, one.choices or tuple(Level(k, k * one.each) for k in counts)))
    return Space(tuple(units))


@pytest.fixture(scope="session")
def space_of() -> Callable[..., Space]:
    """Makes the space of a pruner: (model, pruner, kept) -> space; see `space_for`."""
    return space_for


def even(unit: Unit, index: int) -> list[float]:
    """As much of each level."""
    return [1 / len(unit.levels)] * len(unit.levels)


@pytest.fixture(scope="session")
def built() -> Callable[..., Supernet]:
    """Builds a supernet: (model, root, pruner, ids, **options) -> supernet. Options, and what they are by default:

    weights(unit, its index), of each level in what comes next: as much of each; kept, fractions: (0.75, 0.25);
    batch=2; fit="pruned"; track: no progress bar; dense, the dense stream: one of its own.
    """

    def make(model: PreTrainedModel, root: Path, pruner: Pruner, ids: Tensor, **options: Any) -> Supernet:
        space = space_for(model, pruner, options.get("kept", (0.75, 0.25)))
        weights = options.get("weights", even)
        mixture = {unit.name: list(weights(unit, index)) for index, unit in enumerate(space.units)}
        calibration = Calibration(ids, options.get("batch", 2), options.get("fit", "pruned"))
        supernet = Supernet.open_or_create(root, space, {"mixture": mixture, "fit": calibration.fit})
        more = options.get("track", untracked), "build", None, options.get("dense")
        build(model, calibration, pruner, supernet, mixture, "cpu", *more)
        return supernet

    return make


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
