"""From scores of single weights to the order in which the weights go. Scores have the shape of their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def ascending(scores: Tensor) -> Tensor:
    """The stable order of the flattened scores, smallest first, ties by index: (n,) int64.

    Args:
        scores: Finite float32 or float64, without a negative zero. Negative numbers must all be the same; they come
            first.
    """
    bits = scores.flatten().view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    return bits.argsort(stable=True)  # floats sort as their bits do, and integers by radix: ten times as fast on CPUs


def positions(order: Tensor) -> Tensor:
    """Where each index stands in an order, which is the inverse permutation: (n,) int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def rank_in_layer(scores: Tensor) -> Tensor:
    """How many weights of the layer go before each one: (d_out, d_in) int64, every number once, the least score 0."""
    return positions(ascending(scores)).view(scores.shape)


def rank_in_rows(scores: Tensor) -> Tensor:
    """How many weights of the layer go before each one, where every row loses one weight before any loses a second.

    So all rows keep the same number of weights, give or take one: (d_out, d_in) int64, every number once.
    """
    d_out, d_in = scores.shape
    order = scores.argsort(dim=1, stable=True)
    steps = torch.arange(d_in, device=scores.device).expand(d_out, d_in)
    in_row = torch.empty_like(order).scatter_(1, order, steps)
    return in_row * d_out + torch.arange(d_out, device=scores.device).unsqueeze(1)


def rank_in_groups(scores: Tensor, dim: int) -> Tensor:
    """How many of the other scores along `dim` are smaller than each; of equal ones the first ranks lower.

    It is for the groups of N:M: comparing all pairs beats sorting where groups are small and many.

    Returns:
        int64, of the shape of the scores.
    """
    mine, other = scores.unsqueeze(dim), scores.unsqueeze(dim + 1)  # the others run along dim, the ranked along dim + 1
    size = scores.shape[dim]
    index = torch.arange(size, device=scores.device)
    earlier = (index.unsqueeze(1) < index).view(size, size, *[1] * (scores.dim() - dim - 1))
    before: Tensor = (other < mine) | ((other == mine) & earlier)
    return before.sum(dim)
