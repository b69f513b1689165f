"""What one gradient says of every level of every unit: to first order, by how much the fitness changes when a unit goes
there.

For a unit whose weight is W now and W_l at level l that is `<dL/dW, W_l - W>`. The gradient is walked backwards
sub-block by sub-block from stored inputs; each sub-block is computed once more with autograd on its own weights alone,
and its gradient is reduced to one number a level at once. So it takes the memory of one sub-block, and only that one
has to be on the device. Weights are taken at full size, with zeros where members are gone: what is gone has a gradient,
too, and may come back. A sub-block that comes or goes as a whole is scored by what it adds, `<dL/d(residual stream),
change>`.
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
    """Of the summed loss, at one sub-block, for some sequences.

    Attributes:
        inputs: At its inputs, (batch, tokens, hidden).
        weights: (d_out, d_in) float32 of its units' layers, by name.
        bias: (d_out,) float32 of the layer that ends it.
        presence: For the share of what it adds to the residual stream.
    """

    inputs: Tensor
    weights: dict[str, Tensor]
    bias: Tensor | None
    presence: float


def loss_gradient(
    model: PreTrainedModel, fitness: Fitness, state: Tensor, teacher: Targets, ids: Tensor, unscored: int = 0
) -> Tensor:
    """The gradient of a sequence's summed loss at its last hidden states, (tokens, hidden) like `state`.

    Args:
        model: Its final norm and head are on the device of `state`.
        fitness: The loss.
        state: (tokens, hidden) before the final norm.
        teacher: The dense model's side.
        ids: (tokens,) of the sequence.
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
    """One sub-block, which is present, backwards.

    Args:
        part: On the device; that of the place, or a twin for a thread of its own.
        now: The candidates of its layers whose gradients are asked for, by name; None for a dense layer.
        hidden: (batch, tokens, hidden) residual stream before it.
        context: What its block's attention gets besides.
        behind: PartGradient at its output, of the same shape.
        with_bias: Whether the bias of the layer that ends it is asked for.
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
    """Of the layer that ends the sub-block; zeros where it has none."""
    own = candidate.bias if isinstance(candidate, Members) and candidate.bias is not None else part.bias(part.column)
    weight = part.weight(part.column)
    return weight.new_zeros(len(weight)) if own is None else own.to(weight)


def along(part: SubBlock, layer: str, gradient: Tensor, candidate: Candidate | None) -> float:
    """<gradient, the layer's weight at a candidate>; gradient (d_out, d_in) float32."""
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
    """First-order changes of one sub-block's units, from its gradients over some sequences."""

    def __init__(self, part: SubBlock) -> None:
        """Begin without any."""
        self.part = part
        self.weights: dict[str, Tensor] = {}
        self.bias: Tensor | None = None
        self.presence = 0.0

    def add(self, gradients: Sequence[PartGradient]) -> list[Tensor]:
        """Add up those of more batches of sequences; their gradients (tokens, hidden) before the sub-block, for each
        sequence.
        """
        for one in gradients:
            for name, weight in one.weights.items():
                self.weights[name] = self.weights[name].add_(weight) if name in self.weights else weight
            if one.bias is not None:
                self.bias = one.bias if self.bias is None else self.bias + one.bias
            self.presence += one.presence
        return [before for one in gradients for before in one.inputs.unbind()]

    def effects(self, layer: str | None, candidates: Iterable[Candidate | None], now: int) -> np.ndarray:
        """What the summed loss changes by when a unit goes from level `now` to each of its levels, (levels,) float64.

        Args:
            layer: The unit's layer; None where it is of the sub-block as a whole.
            candidates: Of its levels; None for the dense one. Each is asked for when the one before is done with.
            now: Its level.
        """
        values = [None if is_absent(candidate) else self._value(layer, candidate) for candidate in candidates]
        here = values[now]
        assert here is not None  # gradients are of sub-blocks that are present
        return np.array([-self.presence if value is None else value - here for value in values])

    def _value(self, layer: str | None, candidate: Candidate | None) -> float:
        """What is linear in the layer's weight and bias; nothing where the sub-block comes and goes as a whole."""
        name = layer or self.part.column
        if name not in self.weights:
            return 0.0
        value = along(self.part, name, self.weights[name], candidate)
        if self.bias is not None and name == self.part.column:
            value += _dot(self.bias, _bias(self.part, candidate))
        return value


def presence(change: Tensor, behind: Tensor) -> float:
    """What the loss changes by, to first order, when a sub-block that adds `change` comes back; both (batch, tokens,
    hidden).
    """
    return _dot(behind.float(), change)
