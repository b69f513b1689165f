"""Gradients of the dense model's loss on the calibration text, walked backwards sub-block by sub-block.

A forward pass without autograd keeps the residual stream before each sub-block in main memory; backwards, each
sub-block is computed once more with autograd on its own weights alone. So the graph, and the gradients of the weights,
are those of one sub-block at a time, and the logits those of a few tokens: a model that fits for inference fits for its
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.text.passes import Context, TextWalk, loss_gradient, predictions
from supernet.errors import InputError
from supernet.models.architecture import SubBlock

# What a gradient costs in forward passes: forward, once more with autograd, and backward, which counts as two.
COST = 4

Visit = Callable[[SubBlock, Mapping[str, Tensor]], None]


@torch.no_grad()
def gradients(model: PreTrainedModel, ids: Tensor, device: torch.device, visit: Visit, unscored: int = 0) -> float:
    """Walk the gradient of the mean next-token loss of one batch backwards.

    It starts from the summed loss and is divided by the number of predictions in float32 at the end: in float16 the
    gradient of a mean over many tokens would lose its small numbers.

    Args:
        model: In any float dtype.
        ids: (batch, tokens).
        device: Where the block at work lies.
        visit: Called for each sub-block, the last one first, with the gradients (d_out, d_in) of its linear layers'
            weights, in float32 (or wider where the model is).
        unscored: First positions of each sequence that the loss leaves out, as they predict tokens that always begin
            a sequence.

    Returns:
        The loss.

    Raises:
        InputError: The loss or a gradient is not finite.
    """
    walk, streams = TextWalk(model, device), list[Tensor]()
    for step in walk.steps(ids):
        streams.append(step.before.cpu())
    loss, gradient = loss_gradient(model, step.behind, ids, unscored)
    count = predictions(ids, unscored)
    if not math.isfinite(loss):
        raise _not_finite("the loss on the calibration text")
    for part in walk.lent(backwards=True):
        weights = {layer: part.weight(layer) for stage in part.stages for layer in stage}
        found = backward(part, weights, streams.pop().to(device), walk.context(part, ids.shape[1]), gradient)
        gradient = found.before
        visit(part, {layer: _mean(g, count, f"{part.name}.{layer}") for layer, g in found.weights.items()})
    return loss


@dataclass(frozen=True)
class Backward:
    """What a backward pass through one sub-block gives.

    Attributes:
        before: The gradient at the sub-block's input, (batch, tokens, hidden).
        weights: The gradients of the weights (d_out, d_in) that were asked for, by layer.
        bias: The gradient of the bias (d_out,) of the layer that ends the sub-block, if that was asked for.
        change: What the sub-block adds to the residual stream, (batch, tokens, hidden).
    """

    before: Tensor
    weights: dict[str, Tensor]
    bias: Tensor | None
    change: Tensor


def backward(
    part: SubBlock,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    context: Context,
    behind: Tensor,
    bias: Tensor | None = None,
) -> Backward:
    """Compute one sub-block once more with autograd on some weights alone, and take the gradient through it.

    Args:
        part: The sub-block, on the device of the tensors.
        weights: The weights (d_out, d_in) whose gradients are asked for, by layer; they stand for the module's own.
        hidden: (batch, tokens, hidden), the residual stream before the sub-block.
        context: What its attention takes besides hidden states.
        behind: The gradient of the loss at its output, of the same shape.
        bias: The bias of the layer that ends it, which stands for its own; None where its gradient is not asked for.
    """
    leaves = {layer: weight.detach().requires_grad_() for layer, weight in weights.items()}
    before = hidden.detach().requires_grad_()
    wanted = [before, *leaves.values()]
    own: dict[str, Tensor] = {}
    with torch.enable_grad():
        if bias is not None:
            bias = bias.detach().requires_grad_()
            wanted.append(bias)
        for layer, leaf in leaves.items():
            own |= part.replaced(layer, leaf, bias if layer == part.column else None)
        change = part.change(before, context, own)
    first, *rest = torch.autograd.grad(change, wanted, behind.to(change.dtype), materialize_grads=True)
    of_weights = dict(zip(leaves, rest, strict=False))
    return Backward(behind + first.to(behind.dtype), of_weights, None if bias is None else rest[-1], change.detach())


def _mean(gradient: Tensor, count: int, where: str) -> Tensor:
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if not bool(torch.isfinite(wide).all()):
        raise _not_finite(f"{where}: the gradient")
    return wide / count


def _not_finite(what: str) -> InputError:
    return InputError(f"{what} is not finite; check the model's weights, or use dtype=float32")


def add_on_cpu(totals: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Add values in float32 to the total of this name in main memory."""
    values = values.to("cpu", torch.float32)
    if name in totals:
        totals[name] += values
    else:
        totals[name] = values
