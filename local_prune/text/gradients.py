"""Gradients of the dense model's loss on the calibration text, walked backwards sub-block by sub-block.

A forward pass without autograd keeps the residual stream before each sub-block in main memory; backwards, each
sub-block is computed once more with autograd on its own weights alone. So the graph, and the gradients of the weights,
are those of one sub-block at a time, and the logits those of a few tokens: a model that fits for inference fits for its
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.members import member_layers, sum_by_member
from local_prune.pruner import Calibration, Track
from local_prune.text.passes import Context, begin, lent_parts, loss_gradient, predictions
from supernet.errors import InputError
from supernet.models.architecture import SubBlock

COST = 4  # of a gradient in forward passes: forward, once more with autograd, and backward, which counts as two

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
        unscored: First positions of each sequence that the loss leaves out; see `Calibration`.

    Returns:
        The loss.
    """
    hidden, contexts = begin(model, ids, device)
    streams = []
    for part in lent_parts(model, device):
        streams.append(hidden.cpu())
        hidden = part(hidden, contexts[part.block])
    loss, gradient = loss_gradient(model, hidden, ids, unscored)
    count = predictions(ids, unscored)
    if not math.isfinite(loss):
        raise _not_finite("the loss on the calibration text")
    for part in lent_parts(model, device, backwards=True):
        gradient, found = part_gradients(part, streams.pop().to(device), contexts[part.block], gradient)
        visit(part, {layer: _mean(g, count, f"{part.name}.{layer}") for layer, g in found.items()})
    return loss


def part_gradients(
    part: SubBlock, hidden: Tensor, context: Context, behind: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """One sub-block backwards.

    Args:
        part: On the device of the tensors.
        hidden: (batch, tokens, hidden) residual stream before the sub-block.
        context: What its block's attention gets besides.
        behind: Gradient of the loss at its output, of the same shape.

    Returns:
        The gradient at its input, and those of the weights (d_out, d_in) by layer.
    """
    leaves = {layer: part.weight(layer).detach().requires_grad_() for stage in part.stages for layer in stage}
    before = hidden.detach().requires_grad_()
    weights: dict[str, Tensor] = {}
    with torch.enable_grad():
        for layer, leaf in leaves.items():
            weights |= part.replaced(layer, leaf)
        output = part(before, context, weights)
    first, *rest = torch.autograd.grad(output, [before, *leaves.values()], behind, materialize_grads=True)
    return first, dict(zip(leaves, rest, strict=True))


def _mean(gradient: Tensor, count: int, where: str) -> Tensor:
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if not bool(torch.isfinite(wide).all()):
        raise _not_finite(f"{where}: the gradient")
    return wide / count


def _not_finite(what: str) -> InputError:
    return InputError(f"{what} is not finite; check the model's weights, or use dtype=float32")


def weight_gradient_norms(
    model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track, power: int
) -> dict[str, Tensor]:
    """Norm over the calibration sequences of each weight's gradient (GBLM-Pruner, Das et al. 2023).

    The loss of a sequence is its mean over tokens; the sums are not divided by the number of sequences, as in the
    authors' code.
    Memory: one float32 copy of the linear layers.

    Args:
        model: The dense model.
        calibration: Its text.
        device: Where the block at work lies.
        track: Draws progress.
        power: 1 or 2, of the norm.

    Returns:
        Sub-block and layer, joined by a dot -> (d_out, d_in) float32 on the CPU.
    """
    if power not in (1, 2):
        raise InputError(
            f"the norm of the gradients over sequences is {power} but must be 1 or 2; 2 is the usual choice"
        )
    totals: dict[str, Tensor] = {}

    def visit(part: SubBlock, found: Mapping[str, Tensor]) -> None:
        for layer, gradient in found.items():
            _add(totals, f"{part.name}.{layer}", gradient.abs() if power == 1 else gradient.square())

    for ids in track(calibration.ids.split(1), "gradients"):
        gradients(model, ids, device, visit, calibration.unscored)
    return totals if power == 1 else {name: total.sqrt_() for name, total in totals.items()}


def member_saliencies(
    model: PreTrainedModel, parts: Sequence[SubBlock], calibration: Calibration, device: torch.device, track: Track
) -> dict[str, Tensor]:
    """First-order importance of each member (LLM-Pruner, Ma et al. 2023, section 3.2, by elements of weights:
    `param_first`).

    sum |g w| over the weights that go with the member: its rows and its columns. g is the gradient of the mean loss
    over the whole calibration text, so it has to be summed over all batches before the absolute value is taken. Memory:
    one float32 copy of those layers. Biases are left out, as in the authors' code.

    Args:
        model: The dense model.
        parts: Its sub-blocks, with the members asked for.
        calibration: Its text.
        device: Where the block at work lies.
        track: Draws progress.

    Returns:
        Sub-block -> (members,) float32 on the CPU, for those that have members.
    """
    totals: dict[str, Tensor] = {}
    layers = {part.name: member_layers(part) for part in parts}
    for ids in track(calibration.ids.split(calibration.batch), "gradients"):
        share = len(ids) / len(calibration.ids)

        def visit(part: SubBlock, found: Mapping[str, Tensor], share: float = share) -> None:
            for layer in layers[part.name]:
                _add(totals, f"{part.name}.{layer}", found[layer] * share)

        gradients(model, ids, device, visit, calibration.unscored)
    return {part.name: _saliency(part, totals) for part in parts if part.groups is not None}


def _saliency(part: SubBlock, totals: dict[str, Tensor]) -> Tensor:
    """Of one sub-block; takes its gradients out of `totals`."""
    products = {}
    for layer in member_layers(part):
        weight = part.weight(layer).detach().to("cpu", torch.float32)
        products[layer] = totals.pop(f"{part.name}.{layer}").mul_(weight).abs_()
    return sum_by_member(part, products)


def _add(totals: dict[str, Tensor], name: str, values: Tensor) -> None:
    values = values.to("cpu", torch.float32)
    if name in totals:
        totals[name] += values
    else:
        totals[name] = values
