"""The kept weights' own least squares, after a method has chosen them: what pruning one after the other leaves on the table.

For a mask fixed, every output is a least-squares problem of its own on the weights that stay, too many to factorise. A few steps
of conjugate gradients from where the method ended bring all of them, at all levels at once, most of the way to the optimum: a
step is one product with the Hessian (as the last phase of ALPS, Meng et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit(hessian: Tensor, target: Tensor, mask: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Lower tr((W - T)^T H (W - T)) over the weights where the mask is True, never raising it.

    Preconditioned by the diagonal; systems that are solved exactly stop moving.

    Args:
        hessian: (d_in, d_in), positive definite.
        target: T, (d_in, d_out), where the error is 0.
        mask: (d_in, levels, d_out) bool.
        weights: (d_in, levels, d_out), zero where the mask is False; changed in place.
        steps: Of conjugate gradients.

    Returns:
        `weights`.
    """
    W, gone = weights.view(len(weights), -1), ~mask.view(len(weights), -1)
    scale = 1.0 / hessian.diagonal().unsqueeze(1)
    tiny = torch.finfo(W.dtype).tiny
    residual = (hessian @ (target.repeat(1, mask.shape[1]) - W)).masked_fill_(gone, 0.0)
    direction = residual * scale
    energy = (residual * direction).sum(0)
    for _ in range(steps):
        along = (hessian @ direction).masked_fill_(gone, 0.0)
        length = energy / (direction * along).sum(0).clamp_min(tiny)
        W.addcmul_(direction, length)
        residual.addcmul_(along, length, value=-1.0)
        preconditioned = residual * scale
        before, energy = energy, (residual * preconditioned).sum(0)
        direction.mul_(energy / before.clamp_min(tiny)).add_(preconditioned)
    return weights
