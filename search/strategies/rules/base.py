"""What allocation rules share. A rule is a strategy that computes its allocation by a formula and does not search.

Most rules wish a sparsity for every unit, which they compute from the dense model; `towards` finds the nearest
allocation that the budget allows. `walk` passes the calibration text through the dense model once, with one block at a
time on the device, and shows a rule what it sees there.
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

TIE = 1e-6  # weight of the distance to the uniform allocation: it decides if several allocations are equally near

# What a rule does at each sub-block; `walk` says what it is called with.
SubBlockVisitor = Callable[[SubBlock, Tensor, Mapping[str, Tensor], Tensor], None]


class Rule(StrategyDefaults):
    """A strategy that computes its allocation in a single generation, by `allocate`.

    Most rules look at the dense model alone: they need no candidates and measure no allocations.
    """

    is_rule: ClassVar[bool] = True
    looks_at: ClassVar[str] = "the calibration text once"

    @property
    def needs_candidates(self) -> bool:
        """Return False, because the rule looks at the dense model alone."""
        return False

    @property
    def generations(self) -> int:
        """Return 1, because a formula has its answer at once."""
        return 1

    @property
    def tokens_per_generation(self) -> int:
        """Return 0, because no allocation is measured; the state counts the calibration text that was passed."""
        return 0

    def pool_warning(self, sequences: int, length: int) -> str | None:
        """Warn of a short search text only if the rule measures something on it."""
        return super().pool_warning(sequences, length) if self.tokens_per_generation else None

    def begin(self, problem: Problem, seed: int) -> State:
        """Return a plain state at the start: a rule remembers nothing else."""
        return State.first(problem.start, seed)

    def advance(self, problem: Problem, state: State) -> tuple[State, list[HistoryRow]]:
        """Compute the allocation, unless the budget leaves only one."""
        only = only_allocation(problem)
        if only is not None:
            return replace(state, parent=only, exhausted=True), []
        if problem.dense is not None:
            self.check_units(problem.dense.model, problem.space)
        allocation, tokens = self.allocate(problem)
        return State(allocation, None, state.generation + 1, state.tokens + tokens, state.rng), []

    def allocate(self, problem: Problem) -> tuple[Allocation, int]:
        """Return the allocation, and how many tokens were passed through the model for it."""
        raise NotImplementedError


def only_allocation(problem: Problem) -> Allocation | None:
    """Return the only allocation to choose, or None if there is a choice.

    It is the dense one if that is within the budget, and the sparsest one if no other is.
    """
    budget, units = problem.budget, problem.space.units
    dense = (0,) * len(units)
    sparsest = tuple(len(unit.levels) - 1 for unit in units)
    if budget.fits(dense):
        return dense
    denser = ((*sparsest[:i], level - 1, *sparsest[i + 1 :]) for i, level in enumerate(sparsest) if level)
    return None if any(budget.fits(one) for one in denser) else sparsest


def target_sparsity(budget: Budget) -> float:
    """Return the sparsity that the budget asks for: which fraction to remove of what its leading limit counts."""
    return 1.0 - budget.leading.target / budget.leading.dense


def unit_sizes(budget: Budget) -> np.ndarray:
    """Return what each unit costs when it is dense, as the leading limit counts, (units,) float64."""
    return np.array([costs[0] for costs in budget.leading.costs], dtype=np.float64)


def towards(problem: Problem, sparsities: Sequence[float] | np.ndarray) -> Allocation:
    """Return the allocation that is nearest to the sparsities wished for, among those that the budget allows.

    Distance is the squared difference of sparsities, weighted by the size of the unit, so that units give way to the
    budget in proportion to their size. A tie goes to the allocation nearest to the uniform one.

    Args:
        problem: The problem, whose budget's leading limit counts what sparsity is of.
        sparsities: (units,).

    Raises:
        InputError: If a sparsity is not finite.
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
    """Return the allocation of least summed loss that the problem allows, or nearly so.

    It is the knapsack's solution. If that leaves more of the budget than the problem allows, it is instead the start,
    improved by changes of one or two units for as long as that helps.

    Args:
        losses: For each unit (levels,), what each level loses.
        problem: The problem to solve.
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
    """Find the change of one or two units that lowers the loss most and that the problem allows.

    Returns:
        The units and their new levels; empty if no change lowers the loss.
    """
    budget = problem.budget
    # The first change changes nothing, so that a pair of it and another one is a change of one unit.
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
    """Return the dense model of a problem, or raise an InputError if it comes without one."""
    if problem.dense is None:
        raise InputError(
            "this strategy computes its allocation from the dense model, which this problem does not come with"
        )
    return problem.dense


@dataclass(frozen=True)
class Site:
    """Where a unit acts: on whole sub-blocks, or on one linear layer.

    Attributes:
        parts: The sub-blocks; two if the unit is a whole block.
        layer: Which linear layer of the (only) sub-block the unit is; None for whole sub-blocks.
    """

    parts: tuple[SubBlock, ...]
    layer: str | None

    @property
    def block(self) -> int:
        """The index of the decoder block that the unit is in."""
        return self.parts[0].block

    @property
    def layers(self) -> list[tuple[SubBlock, str]]:
        """The linear layers that belong to the unit, each with its sub-block."""
        if self.layer is not None:
            return [(self.parts[0], self.layer)]
        return [(part, layer) for part in self.parts for layer in layers_of(part)]


def layers_of(part: SubBlock) -> list[str]:
    """Return the names of all linear layers in a sub-block."""
    return [layer for stage in part.stages for layer in stage]


def sites(model: PreTrainedModel, space: Space) -> list[Site]:
    """Return where each unit of the space acts, or raise an InputError if one is no part of the model."""
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
    """Return the summed size of the units in each block that has any, by the block's index, in rising order."""
    found: dict[int, float] = {}
    for site, size in zip(of_units, sizes, strict=True):
        found[site.block] = found.get(site.block, 0.0) + float(size)
    return dict(sorted(found.items()))


@torch.no_grad()
def walk(
    dense: Dense,
    visit: SubBlockVisitor,
    ids: Tensor | None = None,
    replaced: Callable[[SubBlock], Replaced] | None = None,
) -> int:
    """Pass the calibration text through the model once, and show a rule what happens at every sub-block.

    Args:
        dense: The model, its text, and the device.
        visit: Called for each sub-block and batch with the sub-block, the residual stream (batch, tokens, hidden)
            before it, the inputs (tokens, d_in) of its linear layers by name, and the residual stream after it. The
            block is on the device during the call.
        ids: Text to pass instead of the calibration text, (sequences, tokens).
        replaced: Gives the parameters that stand in for a sub-block's own, by name, or None to leave it out.

    Returns:
        How many tokens were passed through the model.
    """
    ids = dense.ids if ids is None else ids
    text = TextWalk(dense.model, dense.device)
    for batch in ids.split(dense.batch):
        for step in text.steps(batch, replaced, record=True):
            visit(step.part, step.before, step.inputs, step.behind)
    return ids.numel()


def input_moments(dense: Dense) -> tuple[dict[str, Moments], int]:
    """Take the moments of every linear layer's inputs over the calibration text.

    Returns:
        The moments by `<sub-block>.<layer>`, where layers with the same inputs share them, and how many tokens were
        passed through the model.
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
    """Return the error that says that a rule is not for units of this kind.

    Args:
        rule: The name of the rule.
        needs: The kinds of units that it is for, in words.
        unit: The unit that is none of these.
        instead: What the user can do.
    """
    return InputError(f"strategy={rule} is for {needs}, and {unit.name} is none ({unit.kind}); {instead}")
