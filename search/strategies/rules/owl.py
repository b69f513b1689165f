"""OWL (Yin et al. 2023, "Outlier Weighed Layerwise Sparsity"): blocks with more outliers keep more.

An outlier is an entry of |W_ij| ||X_j||_2 that is more than M times the mean over all linear layers of its block. As in
the authors' code (luuyin/OWL), the shares of outliers are scaled to a width of 2 lambda and are then the blocks' keep
ratios around that of the budget; all layers of a block get the same ratio.

Unlike in their code, blocks count in the mean by their size, which makes no difference if they are all alike, and a
ratio stays between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from local_prune.statistics import Moments
from local_prune.text.devices import on_device
from search.strategies.base import Dense, Problem
from search.strategies.checks import check_number
from search.strategies.rules.base import (
    Rule,
    by_block,
    dense_of,
    input_moments,
    layers_of,
    sites,
    target_sparsity,
    towards,
    unit_sizes,
)
from supernet.models.architecture import blocks, sub_blocks
from supernet.space import Allocation

ROWS = 1024  # how many rows of a weight are held in float32 at a time


def outlier_share(layers: Iterable[tuple[Tensor, Tensor]], outlier: float) -> float:
    """Return which fraction of all |W_ij| ||X_j||_2 lies above `outlier` times their mean.

    Args:
        layers: For each linear layer its weight W (d_out, d_in) and the norms ||X_j||_2 (d_in,) of its inputs.
        outlier: The paper's M.
    """
    layers = list(layers)
    entries = sum(W.numel() for W, _ in layers)
    mean = sum(float((W.detach().double().abs().sum(0) * norms.double()).sum()) for W, norms in layers) / entries
    above = 0
    for W, norms in layers:
        for rows in W.detach().split(ROWS):
            above += int((rows.float().abs() * norms.float() > outlier * mean).sum())
    return above / entries


def owl_sparsities(shares: np.ndarray, sizes: np.ndarray, sparsity: float, spread: float) -> np.ndarray:
    """Turn shares of outliers into sparsities, (blocks,): the more outliers, the lower the sparsity.

    The extreme ones differ by 2 * spread, and the mean, weighted by size, is that of the budget.

    Args:
        shares: (blocks,) share of outliers in each block.
        sizes: (blocks,) how much each block counts in the mean sparsity.
        sparsity: The mean sparsity that the budget asks for.
        spread: The paper's lambda.
    """
    width = np.ptp(shares)
    keep = (shares - shares.min()) / width * 2.0 * spread if width else np.zeros_like(shares)
    centred: np.ndarray = keep - np.average(keep, weights=sizes)
    return np.clip(sparsity - centred, 0.0, 1.0)


@dataclass(frozen=True)
class Owl(Rule):
    """Sparsity by the share of outliers in a block, the same for all of its units, of whatever kind.

    Attributes:
        outlier: How many times the mean an outlier exceeds, the paper's M.
        spread: Half of the difference between the highest and the lowest keep ratio, the paper's lambda.
    """

    name: ClassVar[str] = "owl"

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        check_number("outlier", self.outlier, 0.0, float("inf"), "5")
        check_number("spread", self.spread, 0.0, 0.5, "0.08")

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Count the outliers of each block, and take the allocation nearest to the sparsities that follow."""
        dense = dense_of(problem)
        of_units = sites(dense.model, problem.space)
        moments, tokens = input_moments(dense)
        sizes = by_block(of_units, unit_sizes(problem.budget))
        shares = np.array([self._share(dense, block, moments) for block in sizes])
        wished = owl_sparsities(shares, np.array(list(sizes.values())), target_sparsity(problem.budget), self.spread)
        of_block = dict(zip(sizes, wished, strict=True))
        return towards(problem, [of_block[site.block] for site in of_units]), tokens

    def _share(self, dense: Dense, block: int, moments: Mapping[str, Moments]) -> float:
        with on_device(blocks(dense.model)[block], dense.device):
            parts = [part for part in sub_blocks(dense.model) if part.block == block]
            layers = [
                (part.weight(layer), moments[f"{part.name}.{layer}"].norms)
                for part in parts
                for layer in layers_of(part)
            ]
            return outlier_share(layers, self.outlier)
