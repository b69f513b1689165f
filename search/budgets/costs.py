"""What each level of each unit takes of a whole model, counted exactly: parameters, bytes and FLOPs.

What no unit has (embeddings, final norm, head, and all that a pruner leaves alone) is the rest, so that an allocation's
costs and the rest are the whole pruned model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search.budgets.budget import Costs
from supernet.models.architecture import SubBlock, parameter_count, sub_blocks
from supernet.models.placement import places
from supernet.space import ATTENTION, WEIGHTS, Space, Unit


@dataclass(frozen=True)
class CostTable:
    """What each level of each unit takes, never rising from level to level, and what the dense model takes besides."""

    costs: Costs
    rest: int

    @property
    def dense(self) -> int:
        """The cost of the whole dense model."""
        return self.rest + sum(row[0] for row in self.costs)

    @property
    def lowest(self) -> int:
        """The cost of the whole model with every unit at its sparsest level."""
        return self.rest + sum(row[-1] for row in self.costs)


Amounts = Callable[
    [SubBlock, str | None, Unit], list[int]
]  # of a unit's levels, in a sub-block or one linear layer of it


def parameters(model: PreTrainedModel, space: Space) -> CostTable:
    """Count parameters, tied ones once. Single weights that are zero do not count."""

    def amounts(part: SubBlock, layer: str | None, unit: Unit) -> list[int]:
        if layer is not None:
            return (
                [level.kept for level in unit.levels]
                if unit.kind == WEIGHTS
                else [_size(part, layer)] * len(unit.levels)
            )
        whole = sum(parameter.numel() for parameter in _own(part))
        return [whole - unit.levels[0].cost + level.cost if level.kept else 0 for level in unit.levels]

    return _table(model, space, parameter_count(model), amounts)


def size(model: PreTrainedModel, space: Space, dtype: torch.dtype) -> CostTable:
    """Count the bytes of the parameters in the exported file, tied ones once.

    Single weights and bit widths are written at full size, whatever their level.

    Args:
        model: The dense model.
        space: Units and levels.
        dtype: That the file has its weights in. Parameters that are not of the model's dtype in memory keep their own.
    """

    def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (dtype.itemsize if p.dtype == model.dtype else p.element_size()) for p in parameters)

    def amounts(part: SubBlock, layer: str | None, unit: Unit) -> list[int]:
        if layer is not None:
            return [_size(part, layer) * dtype.itemsize] * len(unit.levels)
        whole = bytes_of(_own(part))
        return [
            whole - (unit.levels[0].cost - level.cost) * dtype.itemsize if level.kept else 0 for level in unit.levels
        ]

    return _table(model, space, bytes_of(model.parameters()), amounts)


def flops(model: PreTrainedModel, space: Space, tokens: int) -> CostTable:
    """Count the FLOPs of the forward pass of one sequence: two for each multiply-add of linear layers, convolutions,
    attention and head.

    Full attention counts every pair of tokens, which is what its matrix products do though a mask hides half of them.
    In a layer with a sliding window each token counts as many others as the window holds. Queries, keys and values of a
    head have the same width in all families known. Elementwise work and a mixer's scan are left out; a single weight
    that is zero takes none.

    Args:
        model: The dense model.
        space: Units and levels.
        tokens: Of the sequence.
    """

    def amounts(part: SubBlock, layer: str | None, unit: Unit) -> list[int]:
        if layer is not None:
            kept = (
                [level.kept for level in unit.levels]
                if unit.kind == WEIGHTS
                else [_size(part, layer)] * len(unit.levels)
            )
            return [2 * tokens * weights for weights in kept]
        whole, member = _flops(part, tokens), _member_flops(part, tokens)
        return [whole - (unit.total - level.kept) * member if level.kept else 0 for level in unit.levels]

    parts = sub_blocks(model)
    outside = 2 * tokens * (_multiplied(model) - sum(_multiplied(part.module) for part in parts))
    return _table(model, space, outside + sum(_flops(part, tokens) for part in parts), amounts)


def _table(model: PreTrainedModel, space: Space, whole: int, amounts: Amounts) -> CostTable:
    costs = [[0] * len(unit.levels) for unit in space.units]
    for place in places(model, space):
        for index, layer in place.units:  # a whole block's unit is in the places of both of its sub-blocks
            row = amounts(place.part, layer, space.units[index])
            costs[index] = [before + more for before, more in zip(costs[index], row, strict=True)]
    return CostTable(tuple(map(tuple, costs)), whole - sum(row[0] for row in costs))


def _own(part: SubBlock) -> list[nn.Parameter]:
    """Return all parameters that go when the whole sub-block goes: the module's and its norms'."""
    modules = [module for module in (part.module, part.norm, part.post_norm) if module is not None]
    return [parameter for module in modules for parameter in module.parameters()]


def _size(part: SubBlock, layer: str) -> int:
    return part.weight(layer).numel()


def _multiplied(module: nn.Module) -> int:
    """Return how many weights every token is multiplied with."""
    kinds = nn.Linear | Conv1D | nn.Conv1d
    return sum(found.weight.numel() for found in module.modules() if isinstance(found, kinds))


def _flops(part: SubBlock, tokens: int) -> int:
    return 2 * tokens * _multiplied(part.module) + _attention_flops(part, part.weight(part.column).shape[1], tokens)


def _attention_flops(part: SubBlock, channels: int, tokens: int) -> int:
    """Return the FLOPs of attention scores and weighted values, for query heads of so many channels together."""
    return 4 * tokens * _seen(part, tokens) * channels if part.kind == ATTENTION else 0


def _seen(part: SubBlock, tokens: int) -> int:
    """Return how many tokens each token attends to: all of them, or those in a sliding window."""
    config = getattr(part.module, "config", None)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if types is not None:
        slides = types[part.block] == "sliding_attention"
    else:
        slides = getattr(config, "use_sliding_window", True)
    return min(tokens, int(window)) if slides and window else tokens


def _member_flops(part: SubBlock, tokens: int) -> int:
    """Return the FLOPs that go with one member; 0 for a sub-block without members."""
    if part.groups is None:
        return 0
    weights = part.weight(part.column).shape[0] * part.groups.width
    weights += sum(rows.count * part.weight(rows.layer).shape[1] for rows in part.groups.rows)
    return 2 * tokens * weights + _attention_flops(part, part.groups.width, tokens)
