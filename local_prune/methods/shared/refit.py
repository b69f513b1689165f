"""Refitting the weights that stay, after a method has chosen them.

Methods that remove one weight after the other end short of the optimum of the weights that they keep. Once the mask is
fixed, every output is a least-squares problem of its own, and these are too many to factorise. A few steps of conjugate
gradients from where the method ended bring all of them, at all levels at once, most of the way: a step is one product
with the Hessian (as in the last phase of ALPS, Meng et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

SYSTEMS = 1024  # outputs and levels at a time: their vectors of a step stay in the caches


def refit(hessian: Tensor, target: Tensor, mask: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Lower tr((W - T)^T H (W - T)) by changing the weights where the mask is True; no step raises it.

    Args:
        hessian: (d_in, d_in), positive definite.
        target: T, (d_in, d_out), where the error is 0.
        mask: (d_in, levels, d_out) bool.
        weights: (d_in, levels, d_out), contiguous, zero where the mask is False; changed in place.
        steps: How many steps of conjugate gradients to take.

    Returns:
        `weights`.
    """
    levels, d_out = mask.shape[1:]
    every, gone = weights.view(len(weights), -1), ~mask.view(len(weights), -1)
    output = torch.arange(d_out, device=weights.device).repeat(levels)
    for start in range(0, levels * d_out if steps else 0, SYSTEMS):
        part = slice(start, start + SYSTEMS)
        every[:, part] = _solved(hessian, target[:, output[part]], gone[:, part], every[:, part], steps)
    return weights


def _solved(hessian: Tensor, target: Tensor, gone: Tensor, start: Tensor, steps: int) -> Tensor:
    """Conjugate gradients, preconditioned by the diagonal. Systems that are solved exactly stop moving.

    All tensors but the Hessian are (d_in, systems): `target` is T, `gone` says which weights are 0, `start` is W.
    """
    W, scale = start.contiguous(), 1.0 / hessian.diagonal().unsqueeze(1)
    tiny = torch.finfo(W.dtype).tiny
    residual = (hessian @ (target - W)).masked_fill_(gone, 0.0)
    direction = residual * scale
    energy = torch.linalg.vecdot(residual, direction, dim=0)
    for _ in range(steps):
        along = (hessian @ direction).masked_fill_(gone, 0.0)
        length = energy / torch.linalg.vecdot(direction, along, dim=0).clamp_min(tiny)
        W = W.addcmul(direction, length)
        residual.addcmul_(along, length, value=-1.0)
        preconditioned = residual * scale
        before, energy = energy, torch.linalg.vecdot(residual, preconditioned, dim=0)
        direction.mul_(energy / before.clamp_min(tiny)).add_(preconditioned)
    return W
