"""ShortGPT (Men et al. 2024): blocks that change the residual stream least are dropped, by block influence.

BI = 1 - E[cos(x_in, x_out)] over tokens. The paper drops whole blocks; single attentions and MLPs get the influence of
their own sub-block. Where dropping the lowest one after the other ends further below the budget than may be, the units
to drop are those of least summed influence that meet it. How influence would say how sparse a layer should be is not
published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.text.passes import Replaced
from search.strategies.base import Dense, Problem
from search.strategies.rules.base import Rule, Site, allowed, dense_of, sites, walk, wrong_kind
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.space import Allocation, Space


def cosines(before: Tensor, behind: Tensor) -> Tensor:
    """Of each token's state with itself further on, (batch, tokens) float64. Arguments: (batch, tokens, hidden)."""
    return torch.nn.functional.cosine_similarity(before.double(), behind.double(), dim=-1)


@dataclass(frozen=True)
class Similarities:
    """Mean cosine of the residual stream before and behind sub-blocks, by name, and blocks, by index; tokens that it
    took.
    """

    parts: dict[str, float]
    blocks: dict[int, float]
    tokens: int

    def of(self, site: Site) -> float:
        """Of a unit: its sub-block's, or its block's where it is one."""
        return self.parts[site.parts[0].name] if len(site.parts) == 1 else self.blocks[site.block]


def similarities(
    dense: Dense, ids: Tensor | None = None, replaced: Callable[[SubBlock], Replaced] | None = None
) -> Similarities:
    """Pass the calibration text (or other `ids`) through the model; arguments as for `walk`."""
    parts: dict[str, float] = {}
    blocks: dict[int, float] = {}
    entered: dict[int, Tensor] = {}  # the block at work -> the residual stream before it
    passed: dict[int, float] = {}  # the same -> summed cosines behind its sub-blocks so far

    def visit(part: SubBlock, before: Tensor, _: Mapping[str, Tensor], behind: Tensor) -> None:
        if part.block not in entered:
            _close(blocks, passed)
            entered.clear()
            entered[part.block] = before
        parts[part.name] = parts.get(part.name, 0.0) + float(cosines(before, behind).sum())
        passed[part.block] = float(cosines(entered[part.block], behind).sum())

    ids = dense.ids if ids is None else ids
    for batch in ids.split(dense.batch):
        walk(dense, visit, batch, replaced)
        _close(blocks, passed)
        entered.clear()
    for name, total in (*parts.items(), *((f"block {index}", total) for index, total in blocks.items())):
        if not np.isfinite(total):
            raise InputError(f"{name}: activations are not finite; check the model's weights, or use dtype=float32")
    tokens = ids.numel()
    return Similarities({n: t / tokens for n, t in parts.items()}, {b: t / tokens for b, t in blocks.items()}, tokens)


def _close(blocks: dict[int, float], passed: dict[int, float]) -> None:
    """Behind a block, what the last of its sub-blocks left counts."""
    for block, total in passed.items():
        blocks[block] = blocks.get(block, 0.0) + total
    passed.clear()


@dataclass(frozen=True)
class ShortGPT(Rule):
    """Drop the blocks, or sub-blocks, of lowest influence until the budget is met."""

    name: ClassVar[str] = "shortgpt"

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Refuse units of which a part can be removed: they are dropped or kept as a whole."""
        for unit in space.units:
            if unit.total != 1:
                instead = (
                    "use prune=depth, or strategy=adapt_pruner, which gives blocks sparsities by the same similarity"
                )
                raise wrong_kind("shortgpt", "blocks and sub-blocks that are there or not", unit, instead)

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Drop the units of least influence until the budget is met."""
        dense = dense_of(problem)
        of_units = sites(dense.model, problem.space)
        found = similarities(dense)
        influences = np.array([1.0 - found.of(site) for site in of_units])
        dropped = drop_lowest(influences, problem)
        if problem.allows(dropped):
            return dropped, found.tokens
        losses = [
            np.arange(len(u.levels)) * max(0.0, bi) for u, bi in zip(problem.space.units, influences, strict=True)
        ]
        return allowed(losses, problem), found.tokens


def drop_lowest(influences: np.ndarray, problem: Problem) -> Allocation:
    """Units dropped in the order of their influence until the budget is kept; of equal ones the first. influences:
    (units,).
    """
    levels = [0] * len(influences)
    for unit in np.argsort(influences, kind="stable"):
        if problem.budget.fits(levels):
            break
        levels[unit] = len(problem.space.units[unit].levels) - 1
    return tuple(levels)
