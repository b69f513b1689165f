"""ShortGPT (Men et al. 2024): drops the blocks that change the residual stream least, which is called block influence.

Block influence is 1 - E[cos(x_in, x_out)] over tokens. The paper drops whole blocks; here single attentions and MLPs
can be dropped, too, by the influence of their own sub-block. Units are dropped from the lowest influence on. If that
ends too far below the budget, those of least summed influence that meet it are dropped instead. The paper does not say
how influence could decide how sparse a layer should be, so units that can be pruned in part are refused.
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
    """Return the cosine of each token's state at two places in the model, (batch, tokens) float64.

    Args:
        before: (batch, tokens, hidden) residual stream.
        behind: The same further on.
    """
    return torch.nn.functional.cosine_similarity(before.double(), behind.double(), dim=-1)


@dataclass(frozen=True)
class Similarities:
    """How similar the residual stream is before and after the parts of a model: mean cosines over tokens.

    Attributes:
        parts: The mean cosine of each sub-block, by its name.
        blocks: The mean cosine of each block, by its index.
        tokens: How many tokens were passed through the model.
    """

    parts: dict[str, float]
    blocks: dict[int, float]
    tokens: int

    def of(self, site: Site) -> float:
        """Return the mean cosine of a unit: that of its sub-block, or that of its block if the unit is one."""
        return self.parts[site.parts[0].name] if len(site.parts) == 1 else self.blocks[site.block]


def similarities(
    dense: Dense, ids: Tensor | None = None, replaced: Callable[[SubBlock], Replaced] | None = None
) -> Similarities:
    """Pass text through the model, and measure how similar the residual stream is before and after each part.

    Args:
        dense: The model, its text, and the device.
        ids: Text to pass instead of the calibration text, (sequences, tokens).
        replaced: Gives the parameters that stand in for a sub-block's own, by name, or None to leave it out.
    """
    parts: dict[str, float] = {}
    blocks: dict[int, float] = {}
    entered: dict[int, Tensor] = {}  # the residual stream before the block that is being passed
    passed: dict[int, float] = {}  # for that block, the summed cosines after its last sub-block so far

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
    """Count a block that has been passed: its cosines are those after its last sub-block."""
    for block, total in passed.items():
        blocks[block] = blocks.get(block, 0.0) + total
    passed.clear()


@dataclass(frozen=True)
class ShortGPT(Rule):
    """The rule that drops the blocks, or sub-blocks, of lowest influence until the budget is met."""

    name: ClassVar[str] = "shortgpt"

    def check_units(self, model: PreTrainedModel, space: Space) -> None:
        """Refuse units that can be pruned in part: here a unit is dropped or kept as a whole."""
        for unit in space.units:
            if unit.total != 1:
                instead = (
                    "use prune=depth, or strategy=adapt_pruner, which gives blocks sparsities by the same similarity"
                )
                raise wrong_kind("shortgpt", "blocks and sub-blocks that are there or not", unit, instead)

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Drop units from the least influence on, or those of least summed influence if the problem forbids that."""
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
    """Drop units in the order of their influence until the budget is met; of equal ones the first is dropped first.

    Args:
        influences: (units,) block influence of each unit.
        problem: The problem, whose budget is to be met.
    """
    levels = [0] * len(influences)
    for unit in np.argsort(influences, kind="stable"):
        if problem.budget.fits(levels):
            break
        levels[unit] = len(problem.space.units[unit].levels) - 1
    return tuple(levels)
