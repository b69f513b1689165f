"""AlphaPruning (Lu et al. 2024): layers whose spectrum has a heavy tail are trained well, so they keep more.

The rule looks at the weights alone. It estimates the exponent alpha of the tail of the eigenvalues of W^T W by Hill's
estimator: the larger alpha, the more may be removed. The formulas are those of the authors' code
(haiquanlu/AlphaPruning), `alpha_peak` and `alpha_mid` with the linear mapping. Unlike there, eigenvalues that are zero
are left out, and a sparsity above 1 is cut to 1 and made up for by the other units.
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
BINS = 100  # in the histogram of eigenvalues, whose highest bin is the peak


@torch.no_grad()
def spectrum(W: Tensor) -> np.ndarray:
    """Return the eigenvalues of W^T W that are not zero, rising, in float64, for a weight W (d_out, d_in)."""
    W = W.double() if W.shape[0] >= W.shape[1] else W.double().T
    eigenvalues = torch.linalg.eigvalsh(W.T @ W).cpu().numpy()
    found: np.ndarray = eigenvalues[eigenvalues > eigenvalues[-1] * len(eigenvalues) * np.finfo(np.float64).eps]
    return found


def hill(eigenvalues: np.ndarray, tail: str = "peak") -> float:
    """Return Hill's estimate of the exponent of the eigenvalues' density in its tail: 1 + n / sum(log(x / x_min)).

    With `half` the tail begins at the median. With `peak` it begins where a power law fits best, by the
    Kolmogorov-Smirnov distance, among the eigenvalues up to 1.5 times the peak of the histogram of logarithms. At the
    lower end the authors compare an eigenvalue with the logarithm of 0.95 times the peak; that is kept, because their
    results come from it.

    Args:
        eigenvalues: (n,) rising and above 0.
        tail: `peak` or `half`.
    """
    logs = np.log(eigenvalues)
    n = len(logs)
    sums = np.cumsum(logs[::-1])[::-1]  # sums[i] is the sum of logs[i:]
    with np.errstate(divide="ignore"):
        alphas = 1.0 + np.arange(n, 0, -1) / np.maximum(sums - np.arange(n, 0, -1) * logs, 0.0)
    begins = _indices_near_peak(eigenvalues) if tail == "peak" else []
    distances = [
        (
            float(
                np.abs(1.0 - (eigenvalues[i:] / eigenvalues[i]) ** (1.0 - alphas[i]) - np.arange(n - i) / (n - i)).max()
            ),
            i,
        )
        for i in begins
        if np.isfinite(alphas[i])
    ]
    return float(alphas[min(distances)[1] if distances else n // 2])


def _indices_near_peak(eigenvalues: np.ndarray) -> list[int]:
    logs = np.log10(eigenvalues)
    counts, edges = np.histogram(logs, BINS)
    peak = 10.0 ** edges[counts.argmax()]
    near = (eigenvalues >= np.log10(0.95 * peak)) & (eigenvalues <= 1.5 * peak)
    return [int(i) for i in np.flatnonzero(near[:-1])]


def alpha_sparsities(alphas: np.ndarray, sizes: np.ndarray, sparsity: float, epsilon: float) -> np.ndarray:
    """Turn exponents into sparsities, (units,), whose mean, weighted by size, is that of the budget.

    They are first mapped linearly to 1 - epsilon, for the smallest, up to 1 + epsilon, for the largest, then scaled.

    Args:
        alphas: (units,) exponents.
        sizes: (units,) how much each unit counts in the mean sparsity.
        sparsity: The mean sparsity that the budget asks for.
        epsilon: By how much sparsities may differ from the mean, as a fraction of it.
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
        epsilon: By how much sparsities may differ from the budget's, as a fraction of it.
        by: Whether the exponents of all linear layers in the unit's `block` decide, or only those of its own (`layer`).
        tail: Where the tail of a spectrum begins: `half` is the median, `peak` is searched for near the peak.
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
        """Fit the tails of all spectra, and take the nearest allocation; no text is passed through the model."""
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
        """Return the exponent of each linear layer, by block and by the layer's name."""
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
