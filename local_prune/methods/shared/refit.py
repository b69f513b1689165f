"""The kept weights' own least squares, after a method has chosen them: what pruning one after the other leaves on the
table.

For a mask fixed, every output is a least-squares problem of its own on the weights that stay, too many to factorise. A
few steps of conjugate gradients from where the method ended bring all of them, at all levels at once, most of the way
to the optimum: a step is one product with the Hessian (as the last phase of ALPS, Meng et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

SYSTEMS = 1024  # outputs and levels at a time: their vectors of a step stay in the caches


def refit(hessian: Tensor, target: Tensor, mask: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Lower tr((W - T)^T H (W - T)) over the weights where the mask is True, never raising it.

    Args:
        hessian: (d_in, d_in), positive definite.
        target: T, (d_in, d_out), where the error is 0.
        mask: (d_in, levels, d_out) bool.
        weights: (d_in, levels, d_out), contiguous, zero where the mask is False; changed in place.
        steps: Of conjugate gradients.

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
    """Conjugate gradients, preconditioned by the diagonal; systems that are solved exactly stop moving. All (d_in,
    systems).
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
