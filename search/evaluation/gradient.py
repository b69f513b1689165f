"""Predicts, from the gradient at one sub-block, by how much the fitness changes when a unit goes to another level.

For a unit whose weight is W now and W_l at level l the change is `<dL/dW, W_l - W>`, to first order. The gradient is
walked backwards sub-block by sub-block (`search.evaluation.backward`). Each sub-block is computed once more from its
stored inputs, with autograd on its own weights alone, and its gradient is reduced to one number for each level at once.
So this takes the memory of one sub-block, and only that one has to be on the device. Weights are taken at full size,
with zeros where members are gone: what is gone has a gradient, too, and may come back. A sub-block that comes or goes
as a whole is scored by what it adds to the residual stream, `<dL/d(residual stream), change>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from local_prune.text.gradients import backward
from search.evaluation.fitness import NO_LABEL, Fitness, Targets, token_slices_of_all_words
from supernet.candidates import Candidate, Members, Quantised, Weights, member_columns
from supernet.models.architecture import SubBlock
from supernet.models.forward import final_norm_and_head
from supernet.models.placement import full_weight, is_absent


@dataclass(frozen=True)
class PartGradient:
    """The gradient of the summed loss at one sub-block, for some sequences.

    Attributes:
        inputs: The gradient at the sub-block's inputs, (batch, tokens, hidden).
        weights: The gradients of its units' layers, (d_out, d_in) float32 by name.
        bias: The gradient of the bias of the layer that ends it, (d_out,) float32; None where nobody asked for it.
        presence: The derivative by a factor on what the sub-block adds to the residual stream.
    """

    inputs: Tensor
    weights: dict[str, Tensor]
    bias: Tensor | None
    presence: float


def loss_gradient(
    model: PreTrainedModel, fitness: Fitness, state: Tensor, teacher: Targets, ids: Tensor, unscored: int = 0
) -> Tensor:
    """Return the gradient of a sequence's summed loss at its last hidden states, (tokens, hidden) like `state`.

    Args:
        model: The model, whose final norm and head are on the device of `state`.
        fitness: The loss of a token.
        state: (tokens, hidden), the residual stream before the final norm.
        teacher: The dense model's side of the same tokens, on any device.
        ids: (tokens,), the sequence.
        unscored: First positions that are left out of the loss, as they predict tokens that always begin a sequence.
    """
    labels = nn.functional.pad(ids[1:], (0, 1), value=NO_LABEL).to(state.device)
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        _, head = final_norm_and_head(model, leaf.detach())
        found: list[Tensor] = [torch.zeros_like(leaf[:unscored])]
        size = len(state) - unscored
        for tokens in token_slices_of_all_words(size, head, fitness.chunk_bytes // 2):  # autograd keeps logits twice
            piece = slice(tokens.start + unscored, tokens.stop + unscored)
            part = leaf.detach()[piece].requires_grad_()
            normed, _ = final_norm_and_head(model, part)
            loss = fitness(normed.unsqueeze(0), head, teacher[piece].to(state.device), labels[piece]).double().sum()
            found += torch.autograd.grad(loss, part)
    return torch.cat(found)


def part_gradient(
    part: SubBlock,
    now: Mapping[str, Candidate | None],
    hidden: Tensor,
    context: Mapping[str, Any],
    behind: Tensor,
    with_bias: bool,
) -> PartGradient:
    """Take the gradient through a sub-block that is present.

    Args:
        part: The sub-block, on the device: the model's own, or a twin of it for another thread.
        now: The layers whose gradients are asked for, by name, with their candidates; None for a dense layer.
        hidden: (batch, tokens, hidden), the residual stream before the sub-block.
        context: What its attention takes besides hidden states.
        behind: The gradient of the loss behind the sub-block, of the same shape.
        with_bias: Whether the gradient of the bias of the layer that ends it is asked for.
    """
    weights = {name: _weight(part, name, candidate) for name, candidate in now.items()}
    bias = _bias(part, now.get(part.column)) if with_bias else None
    found = backward(part, weights, hidden, context, behind, bias)
    presence = float((behind.to(found.change.dtype).float() * found.change.float()).sum())
    of_weights = {name: gradient.float() for name, gradient in found.weights.items()}
    return PartGradient(found.before, of_weights, None if found.bias is None else found.bias.float(), presence)


def _weight(part: SubBlock, layer: str, candidate: Candidate | None) -> Tensor:
    return part.weight(layer) if candidate is None else full_weight(part, layer, candidate)


def _bias(part: SubBlock, candidate: Candidate | None) -> Tensor:
    """Return the bias (d_out,) of the layer that ends the sub-block; zeros where it has none."""
    own = candidate.bias if isinstance(candidate, Members) and candidate.bias is not None else part.bias(part.column)
    weight = part.weight(part.column)
    return weight.new_zeros(len(weight)) if own is None else own.to(weight)


def along(part: SubBlock, layer: str, gradient: Tensor, candidate: Candidate | None) -> float:
    """Return the inner product of a gradient (d_out, d_in) float32 and the weight that the layer has at a candidate.

    The candidate of the dense level is None.
    """
    match candidate:
        case Members() if part.groups is not None:
            columns = member_columns(candidate.kept.to(gradient.device), part.groups.width)
            kept = part.weight(layer)[:, columns] if candidate.weight is None else candidate.weight
            return _dot(gradient[:, columns], kept)
        case Weights() if candidate.weight is None:
            return _dot(gradient * candidate.mask, part.weight(layer))
        case Weights() | Quantised():
            return _dot(gradient, candidate.weight)
        case _:
            return _dot(gradient, _weight(part, layer, candidate))


def _dot(gradient: Tensor, weight: Tensor | None) -> float:
    assert weight is not None
    return float(torch.dot(gradient.flatten(), weight.to(gradient).flatten()))


class Scorer:
    """Adds up the gradients at one sub-block over sequences, and predicts from them what levels of its units change."""

    def __init__(self, part: SubBlock) -> None:
        """Begin without gradients."""
        self.part = part
        self.weights: dict[str, Tensor] = {}
        self.bias: Tensor | None = None
        self.presence = 0.0

    def add(self, gradients: Sequence[PartGradient]) -> list[Tensor]:
        """Add the gradients of more batches; return those before the sub-block, (tokens, hidden) for each sequence."""
        for one in gradients:
            for name, weight in one.weights.items():
                self.weights[name] = self.weights[name].add_(weight) if name in self.weights else weight
            if one.bias is not None:
                self.bias = one.bias if self.bias is None else self.bias + one.bias
            self.presence += one.presence
        return [before for one in gradients for before in one.inputs.unbind()]

    def effects(self, layer: str | None, candidates: Iterable[Candidate | None], now: int) -> np.ndarray:
        """Predict by how much the summed loss changes when a unit goes from its level to each other one.

        Args:
            layer: The unit's layer; None where the unit is the sub-block as a whole.
            candidates: The candidates of its levels; None for the dense one. Each is taken from the iterator when the
                one before is done with, so that only one of them need be in memory.
            now: The unit's level.

        Returns:
            (levels,) float64; 0 at the level `now`.
        """
        values = [None if is_absent(candidate) else self._value(layer, candidate) for candidate in candidates]
        here = values[now]
        assert here is not None  # gradients are only taken of sub-blocks that are present
        return np.array([-self.presence if value is None else value - here for value in values])

    def _value(self, layer: str | None, candidate: Candidate | None) -> float:
        """Return the part of the loss that is linear in the layer's weight and bias at a candidate.

        It is 0 where no gradient of the layer was taken, as the sub-block only comes and goes as a whole.
        """
        name = layer or self.part.column
        if name not in self.weights:
            return 0.0
        value = along(self.part, name, self.weights[name], candidate)
        if self.bias is not None and name == self.part.column:
            value += _dot(self.bias, _bias(self.part, candidate))
        return value


def presence(change: Tensor, behind: Tensor) -> float:
    """Predict by how much the loss changes when a sub-block that is absent comes back.

    Args:
        change: What the sub-block would add to the residual stream, (batch, tokens, hidden).
        behind: The gradient of the loss behind it, of the same shape.
    """
    return _dot(behind.float(), change)
