"""Adapt-Pruner (Pan et al. 2025): prunes in many small steps, and more where a block changes the residual stream less.

In each step the sparsity of a block grows by (budget's sparsity) / steps - amplitude * importance, where importance is
-cos(x_in, x_out), centred and divided by its largest magnitude. As in the authors' code (research4pan/AdaptPruner),
similarities are measured again on the pruned model before each step, sparsities stay between 0 and 0.99, and the steps
end as soon as the budget is met.

Unlike in their code, the pruned model is put together from the supernet's candidates at the nearest levels, and not
pruned step by step with Taylor scores. With `remeasure=false` the dense model's similarities serve all steps, which
takes a single pass over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from local_prune.text.passes import Replaced
from search.strategies.base import Problem
from search.strategies.checks import check_number, check_whole
from search.strategies.rules.base import (
    Rule,
    by_block,
    dense_of,
    sites,
    target_sparsity,
    towards,
    unit_sizes,
)
from search.strategies.rules.shortgpt import similarities
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.placement import places
from supernet.space import Allocation
from supernet.store import Supernet

HIGHEST = 0.99  # sparsity of a block before the last adjustment to the budget, as in the authors' code


def importances(cosines: np.ndarray) -> np.ndarray:
    """Return -cos of each block, centred and divided by the largest magnitude; zeros if all blocks are alike.

    Args:
        cosines: (blocks,) similarity of the residual stream before and after each block.
    """
    centred: np.ndarray = cosines.mean() - cosines
    largest = np.abs(centred).max()
    return centred / largest if largest > 1e-12 else np.zeros_like(centred)


def stepped(
    cosines: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray, sparsity: float, steps: int, amplitude: float
) -> np.ndarray:
    """Return the sparsity of each block after the last step, (blocks,).

    Args:
        cosines: Measures the similarity of each block when the blocks have given sparsities, (blocks,) -> (blocks,).
        sizes: (blocks,) how much each block counts in the mean sparsity.
        sparsity: The mean sparsity that the budget asks for.
        steps: How many steps there are at most.
        amplitude: By how much the sparsity of a block may grow more, or less, than the mean within a step.
    """
    found = np.zeros(len(sizes))
    for _ in range(steps):
        found = np.clip(found + sparsity / steps - amplitude * importances(cosines(found)), 0.0, HIGHEST)
        if np.average(found, weights=sizes) >= sparsity - 1e-9:
            break
    return found


@dataclass(frozen=True)
class AdaptPruner(Rule):
    """Sparsity by the similarity of the residual stream before and after a block, for units of any kind.

    Attributes:
        steps: How many steps of pruning there are at most.
        amplitude: By how much the sparsity of a block may grow more, or less, than the mean within a step.
        remeasure: Whether similarities are measured before each step on the supernet's candidates; if not, they are
            measured once, on the dense model.
        sequences: How many sequences of the calibration text they are measured on.
    """

    name: ClassVar[str] = "adapt_pruner"
    looks_at: ClassVar[str] = "strategy.sequences of the calibration text, at most strategy.steps times"

    steps: int = 50
    amplitude: float = 0.02
    remeasure: bool = True
    sequences: int = 10

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, "50")
        check_number("amplitude", self.amplitude, 0.0, 1.0, "0.02")
        check_whole("sequences", self.sequences, 1, "10")
        if type(self.remeasure) is not bool:
            raise InputError(f"strategy.remeasure={self.remeasure} must be true or false")

    @property
    def needs_candidates(self) -> bool:
        """Return whether similarities are measured again on the pruned model, which is made of candidates."""
        return self.remeasure

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Raise the sparsities of blocks step by step, and take the allocation nearest to them."""
        dense = dense_of(problem)
        of_units = sites(dense.model, problem.space)
        sizes = by_block(of_units, unit_sizes(problem.budget))
        ids = dense.ids[: self.sequences]
        supernet = self._supernet(problem)
        measured: dict[Allocation, np.ndarray] = {}  # steps that change no level need no passes

        def cosines(sparsities: np.ndarray) -> np.ndarray:
            of_block = dict(zip(sizes, sparsities, strict=True))
            levels = nearest(problem, [of_block[site.block] for site in of_units]) if supernet else (0,) * len(of_units)
            if levels not in measured:
                weights = _candidates(problem, supernet, levels) if supernet else None
                found = similarities(dense, ids, weights)
                measured[levels] = np.array([found.blocks[block] for block in sizes])
            return measured[levels]

        of_blocks = np.array(list(sizes.values()))
        wished = stepped(cosines, of_blocks, target_sparsity(problem.budget), self.steps, self.amplitude)
        of_block = dict(zip(sizes, wished, strict=True))
        return towards(problem, [of_block[site.block] for site in of_units]), len(measured) * ids.numel()

    def _supernet(self, problem: Problem) -> Supernet | None:
        if not self.remeasure:
            return None
        if problem.supernet is None:
            raise InputError(
                "strategy.remeasure=true needs a supernet's candidates; use strategy.remeasure=false without one"
            )
        return problem.supernet


def nearest(problem: Problem, sparsities: Sequence[float]) -> Allocation:
    """Return the allocation whose units are nearest to these sparsities, whether or not it meets the budget.

    Of two levels that are equally near, the denser one is taken.

    Args:
        problem: The problem, whose budget's leading limit counts what sparsity is of.
        sparsities: (units,).
    """
    found = []
    for costs, wish in zip(problem.budget.leading.costs, sparsities, strict=True):
        kept = np.array(costs) / max(1, costs[0])
        found.append(int(np.abs(kept - (1.0 - wish)).round(9).argmin()))
    return tuple(found)


def _candidates(problem: Problem, supernet: Supernet, levels: Allocation) -> Callable[[SubBlock], Replaced]:
    """Return a function that gives the weights of a sub-block when its units are at these levels."""
    dense = dense_of(problem)
    by_name = {place.part.name: place for place in places(dense.model, problem.space)}

    def weights(part: SubBlock) -> Replaced:
        place = by_name[part.name]
        chosen = [
            supernet.candidate(unit, levels[unit], dense.device) if levels[unit] else None for unit, _ in place.units
        ]
        return place.weights(chosen)

    return weights
