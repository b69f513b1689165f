"""AlphaPruning (Lu et al. 2024): layers whose spectrum has a heavy tail are trained well and keep more. Looks at
weights alone.

The exponent alpha of the tail of the eigenvalues of W^T W is Hill's estimate; the larger it is, the more may go.
Formulas as in the authors' code (haiquanlu/AlphaPruning), `alpha_peak` and `alpha_mid`, with its linear mapping.
Different from it: eigenvalues that are zero are left out, and a sparsity above 1 is cut there and made up for by the
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from local_prune.statistics import finite
from local_prune.text.devices import on_device
from search.strategies.base import Dense, Problem
from search.strategies.checks import check_choice, check_number
from search.strategies.rules.base import (
    Rule,
    dense_of,
    layers_of,
    sites,
    target_sparsity,
    towards,
    unit_sizes,
)
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, blocks, sub_blocks
from supernet.space import Allocation

TAILS = ("peak", "half")
BY = ("block", "layer")
BINS = 100  # of the histogram whose highest bin is the peak


@torch.no_grad()
def spectrum(W: Tensor) -> np.ndarray:
    """The eigenvalues of W^T W that are not zero, rising, float64. W: (d_out, d_in)."""
    W = W.double() if W.shape[0] >= W.shape[1] else W.double().T
    eigenvalues = torch.linalg.eigvalsh(W.T @ W).cpu().numpy()
    found: np.ndarray = eigenvalues[eigenvalues > eigenvalues[-1] * len(eigenvalues) * np.finfo(np.float64).eps]
    return found


def hill(eigenvalues: np.ndarray, tail: str = "peak") -> float:
    """Hill's estimate of the exponent of the density of eigenvalues in their tail, 1 + n / sum(log(x / x_min)).

    Args:
        eigenvalues: Rising, above 0.
        tail: Where it begins: `half`, at the median; `peak`, where a power law fits best (by the Kolmogorov-Smirnov
            distance) of the places up to 1.5 times the peak of the histogram of logarithms. The authors' lower end
            compares an eigenvalue with the logarithm of 0.95 times the peak; it is kept, as their results come from it.
    """
    logs = np.log(eigenvalues)
    n = len(logs)
    sums = np.cumsum(logs[::-1])[::-1]  # of the logarithms from each place on
    with np.errstate(divide="ignore"):
        alphas = 1.0 + np.arange(n, 0, -1) / np.maximum(sums - np.arange(n, 0, -1) * logs, 0.0)
    places = _places_near_peak(eigenvalues) if tail == "peak" else []
    distances = [
        (
            float(
                np.abs(1.0 - (eigenvalues[i:] / eigenvalues[i]) ** (1.0 - alphas[i]) - np.arange(n - i) / (n - i)).max()
            ),
            i,
        )
        for i in places
        if np.isfinite(alphas[i])
    ]
    return float(alphas[min(distances)[1] if distances else n // 2])


def _places_near_peak(eigenvalues: np.ndarray) -> list[int]:
    logs = np.log10(eigenvalues)
    counts, edges = np.histogram(logs, BINS)
    peak = 10.0 ** edges[counts.argmax()]
    near = (eigenvalues >= np.log10(0.95 * peak)) & (eigenvalues <= 1.5 * peak)
    return [int(i) for i in np.flatnonzero(near[:-1])]


def alpha_sparsities(alphas: np.ndarray, sizes: np.ndarray, sparsity: float, epsilon: float) -> np.ndarray:
    """Exponents as sparsities: linear from 1 - epsilon to 1 + epsilon, then scaled so that the mean by size is the
    budget's.

    Args:
        alphas: (units,).
        sizes: (units,).
        sparsity: Of the budget.
        epsilon: Half of the width.
    """
    width = np.ptp(alphas)
    ratios = 1.0 + epsilon * (2.0 * (alphas - alphas.min()) / width - 1.0) if width else np.ones_like(alphas)
    found, wanted = np.zeros_like(ratios), sparsity * sizes.sum()
    free = np.ones(len(ratios), dtype=bool)
    while free.any():
        found[free] = ratios[free] * max(0.0, wanted - sizes[~free].sum()) / max((sizes * ratios)[free].sum(), 1e-300)
        above = free & (found > 1.0)
        if not above.any():
            break
        found[above], free = 1.0, free & ~above
    return found


@dataclass(frozen=True)
class AlphaPruning(Rule):
    """Sparsity by the exponent of the weights' spectra, for units of any kind.

    Attributes:
        epsilon: Half of the width of sparsities, as a fraction of the budget's.
        by: `block`: the mean over the linear layers of its block decides for a unit; `layer`: that of its own.
        tail: See `hill`.
    """

    name: ClassVar[str] = "alpha_pruning"
    looks_at: ClassVar[str] = "the weights alone"

    epsilon: float = 0.3
    by: str = "block"
    tail: str = "peak"

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0.0, 1.0, "0.3")
        check_choice("by", self.by, BY)
        check_choice("tail", self.tail, TAILS)

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Fit the tails of all spectra and go to the nearest allocation; no token passes the model."""
        dense = dense_of(problem)
        of_units = sites(dense.model, problem.space)
        of_layers = self._alphas(dense, {site.block for site in of_units})
        alphas = []
        for site in of_units:
            own = [f"{part.name}.{layer}" for part, layer in site.layers]
            names = own if self.by == "layer" else [*of_layers[site.block]]
            alphas.append(np.mean([of_layers[site.block][name] for name in names]))
        sparsity, sizes = target_sparsity(problem.budget), unit_sizes(problem.budget)
        return towards(problem, alpha_sparsities(np.array(alphas), sizes, sparsity, self.epsilon)), 0

    def _alphas(self, dense: Dense, of_blocks: set[int]) -> dict[int, dict[str, float]]:
        """Block -> linear layer -> exponent."""
        found: dict[int, dict[str, float]] = {}
        for block in sorted(of_blocks):
            with on_device(blocks(dense.model)[block], dense.device):
                parts = [part for part in sub_blocks(dense.model) if part.block == block]
                found[block] = {f"{p.name}.{layer}": self._alpha(p, layer) for p in parts for layer in layers_of(p)}
        return found

    def _alpha(self, part: SubBlock, layer: str) -> float:
        name = f"{part.name}.{layer}"
        eigenvalues = spectrum(finite(part.weight(layer), name))
        alpha = hill(eigenvalues, self.tail) if len(eigenvalues) > 1 else float("nan")
        if not np.isfinite(alpha):
            raise InputError(
                f"{name}: the spectrum of its weights has no tail to fit; use strategy=owl or strategy=uniform"
            )
        return alpha
