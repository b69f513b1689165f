"""Bit width: every linear layer on a grid of `2 ** bits` values for each group of neighbouring inputs of an output.

Rounding to nearest (RTN) looks at the weights alone; GPTQ (Frantar et al. 2023, section 4) rounds one input after the
other and lets the inputs still to come make up for the error, which is optimal brain surgery in a fixed order. Pure
functions over tensors; W is (d_in, d_out) here, the transpose of a linear layer's weight, so that an input is a
contiguous row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.pruner import NoSurvey, Task
from local_prune.statistics import Damped, LeastSquares, check_number, solved, zeros_of
from supernet.encodings.encoding import Candidate, Quantised
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.prunables import Prunable, bit_prunables, group_size

# of a group's range that are tried; 40 were no better, 10 up to 2 % worse
SHRINKS = torch.linspace(1.0, 0.3, 20).tolist()
CLIPPED_BITS = (
    5  # the widest grid for which they are; from 6 bits on clipping changes the output error by less than 1 %
)
# of |error| where inputs are not known (as in GPTQ's code): with squares RTN at 2 bits may get worse by clipping
POWER = 2.4
COLUMNS = 32  # inputs between two updates of the rest of a block


@dataclass(frozen=True)
class Layout:
    """How a layer is laid on grids.

    Attributes:
        group: Neighbouring inputs that share a grid; divides d_in.
        symmetric: The code of 0 is `2 ** (bits - 1)`, not free.
        dtype: Of the scales, and of the weights that codes stand for.
    """

    group: int
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Grids:
    """Scales and codes of 0, both (groups, d_out) float32; the scales are rounded to the layout's dtype already."""

    scale: Tensor
    zero: Tensor

    def steps(self, W: Tensor, bits: int) -> Tensor:
        """The nearest codes of W (groups, group, d_out), less the code of 0; same shape, float32."""
        zero = self.zero.unsqueeze(1)
        return (W / self.scale.unsqueeze(1)).round_().clamp_(-zero, 2**bits - 1 - zero)

    def values(self, steps: Tensor, dtype: torch.dtype) -> Tensor:
        """What they stand for: (groups, group, d_out) in the layout's dtype."""
        return (steps * self.scale.unsqueeze(1)).to(dtype)


def grids(W: Tensor, bits: int, layout: Layout, importance: Tensor | None = None) -> Grids:
    """Grids for W, from the range of each group, which always includes 0; up to `CLIPPED_BITS` the best of the
    `SHRINKS`.

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
    """(groups, d_out): of W (groups, group, d_out), with an importance (groups, group, 1)."""
    error = tried.values(tried.steps(W, bits), layout.dtype) - W
    return error.abs_().pow_(POWER).sum(1) if importance is None else (error.square_() * importance).sum(1)


def _candidate(codes: Tensor, found: Grids, bits: int, dtype: torch.dtype) -> Quantised:
    """From codes (d_in, d_out)."""
    scale, zero = found.scale.T.to(dtype).contiguous(), found.zero.T.to(torch.uint8).contiguous()
    return Quantised(codes.T.to(torch.uint8).contiguous(), scale, zero, bits)


def round_to_nearest(W: Tensor, bits: int, layout: Layout) -> Quantised:
    """Each weight of W (d_in, d_out) float32 at the nearest point of its grid."""
    found = grids(W, bits, layout)
    codes = found.steps(W.reshape(-1, layout.group, W.shape[1]), bits) + found.zero.unsqueeze(1)
    return _candidate(codes.view(W.shape), found, bits, layout.dtype)


@dataclass(frozen=True)
class _Table:
    """The grids of all levels side by side: (groups, levels * d_out), codes less the code of 0 from `lowest` to
    `highest`.
    """

    bits: Sequence[int]
    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def fill(self, first: int, levels: Sequence[Tensor], layout: Layout, importance: Tensor) -> None:
        """Take the grids of some groups, from group `first` on, from weights (inputs, d_out) of each level."""
        found = [grids(W, bits, layout, importance) for W, bits in zip(levels, self.bits, strict=True)]
        rows = slice(first, first + len(found[0].scale))
        self.scale[rows] = torch.cat([g.scale for g in found], 1)
        self.lowest[rows] = -torch.cat([g.zero for g in found], 1)
        self.highest[rows] = torch.cat([2**bits - 1 - g.zero for g, bits in zip(found, self.bits, strict=True)], 1)

    def candidates(self, codes: Tensor, dtype: torch.dtype) -> list[Quantised]:
        """One a level, from codes (d_in, levels * d_out)."""
        levels = (x.chunk(len(self.bits), 1) for x in (codes, self.scale, self.lowest))
        return [
            _candidate(c, Grids(scale, -lowest), bits, dtype)
            for c, scale, lowest, bits in zip(*levels, self.bits, strict=True)
        ]


def gptq(
    W: Tensor,
    U: Tensor,
    bits: Sequence[int],
    layout: Layout,
    block: int = 128,
    order: Tensor | None = None,
    zero: Tensor | None = None,
) -> list[Quantised]:
    """GPTQ at several widths at once: they share U, and their outputs are one long row, so that more widths cost little
    time.

    Args:
        W: (d_in, d_out) float32, the optimum before rounding.
        U: (d_in, d_in) upper triangular, with U^T U the inverse of the damped Hessian; its inputs sorted by `order`.
        bits: Widths, at least one.
        layout: Groups, symmetry, dtype.
        block: Inputs between two updates of all later inputs (the paper's B; section 4, step 2).
        order: (d_in,), the inputs in the order of rounding; the grids are then taken from W. Without it inputs are
            rounded as they come, and the grids of a group are taken when its first input is reached, from what its
            weights are by then.

    Returns:
        One candidate a width. Memory: about `5 * len(bits) * d_in * d_out` bytes.
    """
    sequence = torch.arange(len(W), device=W.device) if order is None else order
    # 1 / (H^-1)_jj: cost of an error
    importance = torch.empty_like(U[0]).index_copy_(0, sequence, 1.0 / U.square().sum(0))
    rest = W[sequence].repeat(1, len(bits))
    fixed = None if zero is None else zero[sequence].repeat(1, len(bits))
    table = _Table(bits, *(rest.new_empty(len(W) // layout.group, rest.shape[1]) for _ in range(3)))
    if order is not None:
        table.fill(0, [W if zero is None else W.masked_fill(zero, 0.0)] * len(bits), layout, importance)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=W.device)
    errors = rest.new_empty(min(block, len(W)), rest.shape[1])
    for start, stop, pieces in _blocks(len(W), block, layout.group if order is None else None):
        for first, last in pieces:
            if order is None and first % layout.group == 0:
                reached = slice(first, first + layout.group)
                weights = rest[reached] if fixed is None else rest[reached].masked_fill(fixed[reached], 0.0)
                table.fill(first // layout.group, weights.chunk(len(bits), 1), layout, importance[reached])
            piece, E = slice(first, last), errors[first - start : last - start]
            inputs = sequence[piece]
            groups = inputs // layout.group
            zeros = None if fixed is None else fixed[piece]
            codes[inputs] = _round_piece(rest[piece], U[piece, piece], table, groups, layout.dtype, E, zeros)
            rest[last:stop].addmm_(U[piece, last:stop].T, E, alpha=-1)
        rest[stop:].addmm_(U[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return table.candidates(codes, layout.dtype)


def _blocks(d_in: int, block: int, group: int | None) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Blocks [start, stop) and their pieces; every group begins with a piece, and one larger than `block` with a block.

    The weights of a whole group are read when it begins, and by then the errors before it must have reached them: those
    of earlier blocks reach all weights, those of its own block the weights within the block.
    """
    span = d_in if group is None else max(group, block // group * group)  # blocks begin anew at its multiples
    part = block if group is None else min(group, block)  # and pieces at those of this
    for start, stop in _parts(0, d_in, span):
        for first, last in _parts(start, stop, block):
            yield (
                first,
                last,
                [piece for begin, end in _parts(first, last, part) for piece in _parts(begin, end, COLUMNS)],
            )


def _parts(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def _round_piece(
    W: Tensor, U: Tensor, table: _Table, groups: Tensor, dtype: torch.dtype, errors: Tensor, fixed: Tensor | None
) -> Tensor:
    """Round a few inputs one after the other.

    Within a piece the errors of earlier inputs are gathered when an input is reached: that reads a row each, and writes
    one.

    Args:
        W: (n, levels * d_out), with the errors of all earlier pieces worked in.
        U: (n, n).
        table: Grids.
        groups: (n,) of the inputs.
        dtype: Of the weights that codes stand for.
        errors: (n, levels * d_out), filled with (w - q) / U_jj (equation 2, in the Cholesky form of section 4, step 3).
        fixed: (n, levels * d_out) bool, weights that become 0 wherever they are; None where there are none.

    Returns:
        Codes, (n, levels * d_out) uint8.
    """
    scale, lowest, highest = table.scale[groups], table.lowest[groups], table.highest[groups]
    steps = torch.empty_like(W)
    for j, pivot in enumerate(U.diagonal().tolist()):
        w = torch.addmv(W[j], errors[:j].T, U[:j, j], alpha=-1)
        torch.div(w, scale[j], out=steps[j])
        step = steps[j].round_().clamp_(lowest[j], highest[j])
        if fixed is not None:
            step.masked_fill_(fixed[j], 0.0)
        w -= (step * scale[j]).to(dtype)
        torch.div(w, pivot, out=errors[j])
    return steps.sub_(lowest).to(torch.uint8)


@dataclass(frozen=True)
class _GridPruner(NoSurvey):
    """What both methods share.

    Attributes:
        bits: The widths that layers may get, 2 to 8.
        group: Neighbouring inputs of an output that share a scale and a zero; see
            `supernet.models.prunables.group_size`.
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
        """See `Pruner`: every linear layer."""
        return bit_prunables(parts, self.bits, self.group, self.symmetric)

    def layout(self, task: Task) -> Layout:
        """Of the grids of one layer; InputError if its weights are not finite."""
        if not bool(torch.isfinite(task.dense).all()):
            raise InputError(f"{task.where}: weights are not finite; check the model's weights, or use dtype=float32")
        return Layout(group_size(task.dense.shape[1], self.group), self.symmetric, task.dense.dtype)


@dataclass(frozen=True)
class RtnPruner(_GridPruner):
    """Rounding to nearest, without calibration: `prune=rtn`."""

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1

    def statistics(self, dense: Tensor, width: int) -> None:
        """See `Pruner`: none."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`: one candidate a width in `kept`."""
        layout = self.layout(task)
        W = task.dense.T.float().contiguous()
        return [round_to_nearest(W, bits, layout) for bits in kept]


@dataclass(frozen=True)
class GptqPruner(_GridPruner):
    """Rounding with compensation: `prune=gptq`.

    Attributes:
        activation_order: Round the inputs with the largest activations first, on grids that are fixed before; rarely
            worse.
        damping: Ridge towards the dense weight, as a fraction of the Hessian's mean diagonal.
        block: Inputs between two updates of all later inputs; changes the time, not what is computed.
    """

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1

    activation_order: bool = True
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, "0.01")
        if self.block < 1:
            raise InputError(f"prune.pruner.block={self.block} must be at least 1 input; 128 is the usual choice")

    def statistics(self, dense: Tensor, width: int) -> LeastSquares:
        """See `Pruner`."""
        return LeastSquares.zeros(dense.shape[1], dense.shape[0], dense.device)

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`: one candidate a width in `kept`."""
        if not kept:
            return []
        layout = self.layout(task)
        assert isinstance(task.statistics, LeastSquares)

        def solve(problem: Damped) -> list[Candidate]:
            order = problem.hessian.diagonal().argsort(descending=True, stable=True) if self.activation_order else None
            U = problem.factor.upper_of_inverse(order)
            return list(gptq(problem.solution, U, list(kept), layout, self.block, order, zeros_of(task.dense)))

        return solved(task.statistics, task.dense.T, self.damping, task.where, solve)
