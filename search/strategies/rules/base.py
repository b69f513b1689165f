"""What allocation rules share: strategies that search for nothing and compute their allocation once, from the dense
model.

A rule wishes a sparsity for every unit; `towards` finds the allocation of the space nearest to that which the budget
allows. `walk` takes a rule through the dense model on the calibration text, one block at a time on the device, in a
single pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.statistics import Moments, finite
from local_prune.text.passes import Replaced, TextWalk
from search.budgets.budget import Budget
from search.budgets.knapsack import Losses, knapsack, uniform
from search.strategies.base import Dense, HistoryRow, Problem, StrategyDefaults
from search.strategies.state import State
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.placement import places
from supernet.space import Allocation, Space, Unit

TIE = (
    1e-6  # weight of the distance to the uniform allocation: it decides where a wish is as near to several allocations
)

Visit = Callable[[SubBlock, Tensor, Mapping[str, Tensor], Tensor], None]


class Rule(StrategyDefaults):
    """A strategy that computes its allocation, in one generation and without measuring any unless it says so.

    Most rules look at the dense model alone, and need no candidates.
    """

    is_rule: ClassVar[bool] = True
    looks_at: ClassVar[str] = "the calibration text once"

    @property
    def needs_candidates(self) -> bool:
        """Return False: the dense model is there without any."""
        return False

    @property
    def generations(self) -> int:
        """Return 1: a formula has its answer at once."""
        return 1

    @property
    def tokens_per_generation(self) -> int:
        """Return 0: what a rule spends is calibration text, whose size is not known here; the state counts it."""
        return 0

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn only where something is measured on the search text."""
        return super().pool_warning(sequences, length) if self.tokens_per_generation else None

    def begin(self, problem: Problem, seed: int) -> State:
        """Begin at the start; there is nothing else to remember."""
        return State.first(problem.start, seed)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Compute the allocation, unless the budget leaves no choice."""
        only = only_allocation(problem)
        if only is not None:
            return replace(state, parent=only, exhausted=True), []
        if problem.dense is not None:
            self.check_units(problem.dense.model, problem.space)
        allocation, tokens = self.allocate(problem)
        return State(allocation, None, state.generation + 1, state.tokens + tokens, state.rng), []

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """The allocation, and the forward tokens that it took."""
        raise NotImplementedError


def only_allocation(problem: Problem) -> Allocation | None:
    """The allocation of a space that leaves no choice: the dense one where it fits, the sparsest where no other one
    does.
    """
    budget, units = problem.budget, problem.space.units
    dense = (0,) * len(units)
    sparsest = tuple(len(unit.levels) - 1 for unit in units)
    if budget.fits(dense):
        return dense
    denser = ((*sparsest[:i], level - 1, *sparsest[i + 1 :]) for i, level in enumerate(sparsest) if level)
    return None if any(budget.fits(one) for one in denser) else sparsest


def target_sparsity(budget: Budget) -> float:
    """What the budget asks for: the fraction to remove of what its leading limit counts."""
    return 1.0 - budget.leading.target / budget.leading.dense


def unit_sizes(budget: Budget) -> np.ndarray:
    """(units,) float64: what the leading limit counts of each dense unit."""
    return np.array([costs[0] for costs in budget.leading.costs], dtype=np.float64)


def towards(problem: Problem, sparsities: Sequence[float] | np.ndarray) -> Allocation:
    """The allocation nearest to the sparsities wished for that the budget allows.

    Distance is the squared difference of sparsities, weighted by the size of the unit, so that what must give way for
    the budget does so in proportion. Where several are as near, the one nearest to the uniform allocation.

    Args:
        problem: Its budget's leading limit says what sparsity is of.
        sparsities: (units,), of what that limit counts.
    """
    if not np.isfinite(sparsities).all():
        raise InputError("the sparsities wished for are not finite; check the model's weights, or use dtype=float32")
    limit, even = problem.budget.leading, uniform(problem.space, problem.budget)
    losses = []
    for costs, wish, level in zip(limit.costs, sparsities, even, strict=True):
        kept = np.array(costs) / max(1, costs[0])
        distances = (kept - (1.0 - float(wish))) ** 2 + TIE * (kept - kept[level]) ** 2
        losses.append(distances * costs[0] / limit.dense)
    return allowed(losses, problem)


def allowed(losses: Losses, problem: Problem) -> Allocation:
    """The knapsack's allocation; where it leaves more of the budget than the problem allows, the start, improved step
    by step.
    """
    found = knapsack(losses, problem.budget)
    if problem.allows(found):
        return found
    levels = list(problem.start)
    while move := _better(losses, levels, problem):
        for unit, level in move:
            levels[unit] = level
    return tuple(levels)


def _better(losses: Losses, levels: Sequence[int], problem: Problem) -> list[tuple[int, int]]:
    """The change of one unit, or of two at once, that lowers the loss most of those that the problem allows; empty for
    none.
    """
    budget = problem.budget
    # The first change is none, so that a pair with it is a change of one unit.
    changes = [(-1, 0)] + [(u, v) for u, of_unit in enumerate(losses) for v in range(len(of_unit)) if v != levels[u]]
    units = np.array([unit for unit, _ in changes])
    loss = np.array([0.0] + [losses[u][v] - losses[u][levels[u]] for u, v in changes[1:]])
    added = np.array([[0] + [x.costs[u][v] - x.costs[u][levels[u]] for u, v in changes[1:]] for x in budget.limits])
    rest = np.array([[limit.target - limit.cost(levels)] for limit in budget.limits]) - added  # (limits, changes)
    steps = np.array([[limit.smallest_step] for limit in budget.limits])
    enough = budget.left(problem.start)
    best = (-1e-12, 0, 0)
    for first in range(len(changes)):
        left = ((rest - added[:, first : first + 1]) / steps).min(0)
        allows = (left >= 0) & ((left < 1) | (left <= enough)) & (units > units[first])
        value = np.where(allows, loss + loss[first], np.inf)
        second = int(value.argmin())
        best = min(best, (float(value[second]), first, second))
    return [changes[index] for index in best[1:] if index]


def dense_of(problem: Problem) -> Dense:
    """The dense model of a problem, which this rule looks at."""
    if problem.dense is None:
        raise InputError(
            "this strategy computes its allocation from the dense model, which this problem does not come with"
        )
    return problem.dense


@dataclass(frozen=True)
class Site:
    """Where a unit acts: on sub-blocks as a whole (two for a block), or on one linear layer of one."""

    parts: tuple[SubBlock, ...]
    layer: str | None

    @property
    def block(self) -> int:
        """Index of the block."""
        return self.parts[0].block

    @property
    def layers(self) -> list[tuple[SubBlock, str]]:
        """The linear layers that belong to the unit."""
        if self.layer is not None:
            return [(self.parts[0], self.layer)]
        return [(part, layer) for part in self.parts for layer in layers_of(part)]


def layers_of(part: SubBlock) -> list[str]:
    """All linear layers of a sub-block."""
    return [layer for stage in part.stages for layer in stage]


def sites(model: PreTrainedModel, space: Space) -> list[Site]:
    """Where each unit of the space acts."""
    found: dict[int, Site] = {}
    for place in places(model, space):
        for unit, layer in place.units:
            before = found[unit].parts if unit in found else ()
            found[unit] = Site((*before, place.part), layer)
    for index, unit_ in enumerate(space.units):
        if index not in found:
            raise InputError(f"{unit_.name} is no part of the dense model")
    return [found[index] for index in range(len(found))]


def by_block(of_units: Sequence[Site], sizes: np.ndarray) -> dict[int, float]:
    """Block -> sum of the sizes of its units, for the blocks that have some."""
    found: dict[int, float] = {}
    for site, size in zip(of_units, sizes, strict=True):
        found[site.block] = found.get(site.block, 0.0) + float(size)
    return dict(sorted(found.items()))


@torch.no_grad()
def walk(
    dense: Dense, visit: Visit, ids: Tensor | None = None, replaced: Callable[[SubBlock], Replaced] | None = None
) -> int:
    """Pass the calibration text through the model once.

    Args:
        dense: The model, its text, and where to work.
        visit: Called for each sub-block and batch with the residual stream (batch, tokens, hidden) before it, the
            inputs (tokens, d_in) of its linear layers by name, and the residual stream behind it. The block is on the
            device meanwhile.
        ids: Other text, (sequences, tokens).
        replaced: Parameters of a sub-block that stand for its own.

    Returns:
        Forward tokens.
    """
    ids = dense.ids if ids is None else ids
    text = TextWalk(dense.model, dense.device)
    for batch in ids.split(dense.batch):
        for step in text.steps(batch, replaced, record=True):
            visit(step.part, step.before, step.inputs, step.behind)
    return ids.numel()


def input_moments(dense: Dense) -> tuple[dict[str, Moments], int]:
    """Of the inputs of every linear layer, by `<sub-block>.<layer>` (shared where inputs are the same); forward
    tokens.
    """
    found: dict[str, Moments] = {}

    def visit(part: SubBlock, _: Tensor, inputs: Mapping[str, Tensor], __: Tensor) -> None:
        for stage in part.stages:
            X = inputs[stage[0]]
            name = f"{part.name}.{stage[0]}"
            if name not in found:
                found.update(
                    dict.fromkeys((f"{part.name}.{layer}" for layer in stage), Moments.zeros(X.shape[1], X.device))
                )
            found[name].add(X)

    tokens = walk(dense, visit)
    for name, moments in found.items():
        finite(moments.squares, name)
    return found, tokens


def wrong_kind(rule: str, needs: str, unit: Unit, instead: str) -> InputError:
    """Of a rule that has nothing to say about units of this kind."""
    return InputError(f"strategy={rule} is for {needs}, and {unit.name} is none ({unit.kind}); {instead}")
