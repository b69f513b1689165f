"""What a candidate is: the weights of a unit at one level, without what the dense model has anyway.

There is a class for each kind: members that stay, weights that stay, quantised weights, and a dropped sub-block.
May import nothing of the project; encodings, the store, the local pruners and the search use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Members:
    """Structured pruning: some members (KV groups, query heads, neurons) stay.

    Attributes:
        kept: The indices of the members that stay, (k,) int64, rising.
        weight: The refitted columns of these members in the layer that ends the sub-block, (d_out, k * width); None
            where they are the dense ones.
        bias: (d_out,), which stands for that layer's own bias, if it has one; None where nothing makes up for what is
            gone.
    """

    kept: Tensor
    weight: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Unstructured or N:M pruning: some weights of a linear layer stay.

    Attributes:
        mask: (d_out, d_in) bool, True where a weight stays.
        weight: (d_out, d_in), zero where the mask is False; None where the weights that stay are the dense ones.
    """

    mask: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Quantised:
    """A linear layer on a grid of `2 ** bits` values for each group of neighbouring inputs: `scale * (code - zero)`.

    Attributes:
        codes: (d_out, d_in) uint8, below 2 ** bits.
        scale: (d_out, groups), in the dense weight's dtype.
        zero: (d_out, groups) uint8, the code of 0.
        bits: The width of a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for, (d_out, d_in), computed in float32 and rounded to the scales' dtype."""
        d_out, groups = self.scale.shape
        steps = self.codes.view(d_out, groups, -1).float() - self.zero.unsqueeze(2).float()
        return (steps * self.scale.unsqueeze(2).float()).to(self.scale.dtype).view(self.codes.shape)


@dataclass(frozen=True)
class Dropped:
    """The whole sub-block, or block, is absent."""


Candidate = Members | Weights | Quantised | Dropped


def member_columns(kept: Tensor, width: int) -> Tensor:
    """Return the columns (or rows) of members (k,), each of which has `width` neighbouring ones: (k * width,)."""
    return (kept.unsqueeze(1) * width + torch.arange(width, device=kept.device)).flatten()


def count(candidate: Candidate) -> int:
    """Return how much a candidate keeps, counted as its levels are: in members, in weights, or in bits."""
    match candidate:
        case Members():
            return len(candidate.kept)
        case Weights():
            return int(candidate.mask.count_nonzero())
        case Quantised():
            return candidate.bits
        case Dropped():
            return 0
