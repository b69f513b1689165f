"""GPTQ (Frantar et al. 2023, section 4): one input is rounded after the other, and the next ones make up for the error.

That is optimal brain surgery in a fixed order. Pure functions over tensors; W is (d_in, d_out) here, the transpose of a
linear layer's weight, so that an input is a contiguous row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.fitted import FittedPruner
from local_prune.methods.shared.grids import GridPruner, Grids, Layout, grids, quantised
from local_prune.pruner import Task
from local_prune.statistics import Damped, check_number, zeros_of
from supernet.candidates import Candidate, Quantised
from supernet.errors import InputError

COLUMNS = 32  # inputs between two updates of the rest of a block


@dataclass(frozen=True)
class _Table:
    """The grids of all levels side by side.

    Attributes:
        bits: The width of each level.
        scale: (groups, levels * d_out), like the next two.
        lowest: The smallest code of a grid, counted from its code of 0.
        highest: The largest one.
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
        """One candidate a level, from codes (d_in, levels * d_out)."""
        levels = (x.chunk(len(self.bits), 1) for x in (codes, self.scale, self.lowest))
        return [
            quantised(c, Grids(scale, -lowest), bits, dtype)
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
    """GPTQ at several widths at once.

    They share U, and their outputs are one long row, so that more widths cost little time. The memory that is needed is
    about `5 * len(bits) * d_in * d_out` bytes.

    Args:
        W: (d_in, d_out) float32, the optimum before rounding.
        U: (d_in, d_in) upper triangular, with U^T U the inverse of the damped Hessian; its inputs sorted by `order`.
        bits: Widths, at least one.
        layout: Groups, symmetry, dtype.
        block: Inputs between two updates of all later inputs (the paper's B; section 4, step 2).
        order: (d_in,), the inputs in the order of rounding; the grids are then taken from W. Without it inputs are
            rounded as they come, and the grids of a group are taken when its first input is reached, from what its
            weights are by then.
        zero: (d_in, d_out) bool, weights that are 0 in the dense layer and stay 0; None where there are none.

    Returns:
        One candidate a width.
    """
    sequence = torch.arange(len(W), device=W.device) if order is None else order
    # What an error at input j costs: 1 / (H^-1)_jj.
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
        U: (n, n), the part of U that belongs to these inputs.
        table: Grids of all groups.
        groups: (n,), the group of each input.
        dtype: What the weights are rounded to that codes stand for.
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
class GptqPruner(FittedPruner, GridPruner):
    """Rounding in which later inputs make up for the error of earlier ones: `prune=gptq`.

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

    def fitted(self, problem: Damped, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """All widths in one run, from the optimum before rounding."""
        order = problem.hessian.diagonal().argsort(descending=True, stable=True) if self.activation_order else None
        U = problem.factor.upper_of_inverse(order)
        zero = zeros_of(task.dense)
        return list(gptq(problem.solution, U, list(kept), self.layout(task), self.block, order, zero))
