"""What methods of bit width share: each group of neighbouring inputs of an output has a grid of `2 ** bits` values.

W is (d_in, d_out) here, the transpose of a linear layer's weight, so that an input is a contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from local_prune.pruner import NoSurvey, Task
from supernet.candidates import Quantised
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable, bit_prunables, group_size

# Shares of a group's range that are tried. Forty were no better, ten up to 2 % worse.
SHRINKS = torch.linspace(1.0, 0.3, 20).tolist()
# The widest grid for which they are: from 6 bits on clipping changes the output error by less than 1 %.
CLIPPED_BITS = 5
# Where inputs are not known an error counts by this power (as in GPTQ's code): with squares, rounding to nearest at
# 2 bits may get worse by clipping.
POWER = 2.4


@dataclass(frozen=True)
class Layout:
    """How a layer is laid on grids.

    Attributes:
        group: Neighbouring inputs that share a grid; divides d_in.
        symmetric: The code of 0 is `2 ** (bits - 1)`, not free.
        dtype: What the scales are rounded to, and the weights that codes stand for.
    """

    group: int
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Grids:
    """The grids of a layer's groups.

    Attributes:
        scale: The step of each grid, (groups, d_out) float32, rounded to the layout's dtype already.
        zero: The code of 0, (groups, d_out) float32.
    """

    scale: Tensor
    zero: Tensor

    def steps(self, W: Tensor, bits: int) -> Tensor:
        """The nearest codes of W (groups, group, d_out), less the code of 0; same shape, float32."""
        zero = self.zero.unsqueeze(1)
        return (W / self.scale.unsqueeze(1)).round_().clamp_(-zero, 2**bits - 1 - zero)

    def values(self, steps: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights that steps (groups, group, d_out) stand for, in the layout's dtype."""
        return (steps * self.scale.unsqueeze(1)).to(dtype)


def grids(W: Tensor, bits: int, layout: Layout, importance: Tensor | None = None) -> Grids:
    """Grids for W, from the range of each group, which always includes 0.

    Up to `CLIPPED_BITS` several shares of that range (`SHRINKS`) are tried, and the best one is taken.

    Asymmetric grids reach from the least to the greatest weight. Symmetric ones have steps of `2 max|w| / (2^bits -
    1)`, of which `2^(bits - 1)` lie below 0 and one less above; steps of `max|w| / (2^(bits - 1) - 1)`, which reach
    max|w| on both sides, have twice the error at 2 bits, and the same once ranges are shrunk.

    Args:
        W: (d_in, d_out) float32.
        bits: 2 to 8.
        layout: Groups, symmetry, dtype.
        importance: (d_in,), what a squared error at each input costs; without it errors count by the power `POWER`.

    Returns:
        The grids of all d_in / group groups.
    """
    W = W.reshape(-1, layout.group, W.shape[1])
    lowest, highest = W.amin(1).clamp_max_(0.0), W.amax(1).clamp_min_(0.0)
    best = _spanning(lowest, highest, bits, layout)
    if bits > CLIPPED_BITS:
        return best
    weight = None if importance is None else importance.view(-1, layout.group, 1)
    least = _losses(W, best, bits, layout, weight)
    for shrink in SHRINKS[1:]:
        tried = _spanning(lowest * shrink, highest * shrink, bits, layout)
        losses = _losses(W, tried, bits, layout, weight)
        better = losses < least
        least = torch.where(better, losses, least)
        best = Grids(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
    return best


def _spanning(lowest: Tensor, highest: Tensor, bits: int, layout: Layout) -> Grids:
    """Grids from `lowest` <= 0 to `highest` >= 0, both (groups, d_out); a scale that rounds to 0 becomes 1, so that all
    is 0.
    """
    top = 2**bits - 1
    span = 2.0 * torch.maximum(-lowest, highest) if layout.symmetric else highest - lowest
    scale = (span / top).to(layout.dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)
    if layout.symmetric:
        return Grids(scale, torch.full_like(scale, 2 ** (bits - 1)))
    return Grids(scale, (-lowest / scale).round_().clamp_(0, top))


def _losses(W: Tensor, tried: Grids, bits: int, layout: Layout, importance: Tensor | None) -> Tensor:
    """The error of each group of W (groups, group, d_out) on these grids: (groups, d_out).

    importance: (groups, group, 1), or None.
    """
    error = tried.values(tried.steps(W, bits), layout.dtype) - W
    return error.abs_().pow_(POWER).sum(1) if importance is None else (error.square_() * importance).sum(1)


def quantised(codes: Tensor, found: Grids, bits: int, dtype: torch.dtype) -> Quantised:
    """A candidate from codes (d_in, d_out) on these grids."""
    scale, zero = found.scale.T.to(dtype).contiguous(), found.zero.T.to(torch.uint8).contiguous()
    return Quantised(codes.T.to(torch.uint8).contiguous(), scale, zero, bits)


@dataclass(frozen=True)
class GridPruner(NoSurvey):
    """What all pruners of bit width have in common: their units are linear layers.

    Attributes:
        bits: The widths that layers may get, 2 to 8.
        group: Neighbouring inputs of an output that share a scale and a zero; less where this does not divide the
            inputs of a layer (`supernet.models.prunables.group_size`).
        symmetric: The code of 0 is in the middle, not free, and takes no space.
    """

    bits: Sequence[int] = (8, 6, 4, 3, 2)
    group: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        widths = tuple(self.bits) if isinstance(self.bits, Sequence) and not isinstance(self.bits, str) else ()
        if not widths or not all(isinstance(width, int) and 2 <= width <= 8 for width in widths):
            raise InputError(
                f"prune.pruner.bits={self.bits} must be a list of whole widths from 2 to 8, such as [8,6,4,3,2]"
            )
        if self.group < 1:
            raise InputError(f"prune.pruner.group={self.group} must be at least 1 input; 128 is the usual choice")
        object.__setattr__(self, "bits", widths)  # the configuration's own kind of list cannot be hashed

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """Every linear layer of the sub-blocks."""
        return bit_prunables(parts, self.bits, self.group, self.symmetric)

    def layout(self, task: Task) -> Layout:
        """How a unit's layer is laid on grids; InputError if its weights are not finite."""
        if not bool(torch.isfinite(task.dense).all()):
            raise InputError(f"{task.where}: weights are not finite; check the model's weights, or use dtype=float32")
        return Layout(group_size(task.dense.shape[1], self.group), self.symmetric, task.dense.dtype)
