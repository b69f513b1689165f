"""What SparseGPT and APT share: inputs are pruned block by block from the left, at all levels at once.

All levels are a batch of the same problem, so the working copy of the weights is (d_in, levels * d_out), the transpose
of a linear layer's weight, where a column of the papers is one contiguous row. U is upper triangular with
U^T U = H^-1.

`sweep` goes through the blocks and decides how many weights each one loses. How a block is pruned is what the methods
differ in: their `Solve`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from local_prune.methods.shared.fitted import FittedPruner
from local_prune.methods.shared.ranking import ascending, rank_in_groups
from local_prune.methods.shared.refit import refit
from local_prune.methods.shared.weights import WeightPruner, pattern_of
from local_prune.pruner import Task
from local_prune.statistics import Damped, LeastSquares, check_number, zeros_of
from supernet.candidates import Candidate, Weights
from supernet.errors import InputError
from supernet.models.prunables import Pattern

# Bits of a float32 that a histogram of scores ignores: the others make 128 bins for every power of two.
LOW_BITS = 16
# The most steps of a refit: in exact arithmetic no more are needed than a layer has inputs.
MOST_STEPS = 1000
# Bytes of weights that are pruned together, which says how many levels are; all other buffers are no larger.
WORKING = 1 << 30


@dataclass(frozen=True)
class InputBlock:
    """Neighbouring inputs of a layer that are pruned together, at all levels.

    Attributes:
        weight: (b, levels, d_out), contiguous; solved in place.
        U: (b, b), the part of U that belongs to these inputs.
        kept: Weights that each level keeps: of the block, or of each of its groups.
        of: Inputs in a group of an N:M pattern; None where unstructured.
        zero: (b, d_out) bool, weights that are 0 in the dense layer and stay 0 at all levels; None where there are
            none.
    """

    weight: Tensor
    U: Tensor
    kept: Sequence[int]
    of: int | None
    zero: Tensor | None = None

    def scores(self, deviations: Tensor, part: slice = slice(None)) -> Tensor:
        """|w_ij| / d_j of the weights of some inputs; 0 for weights that are 0 in the dense layer.

        The papers square this. For an order the root is as good, and small weights do not underflow.
        """
        scores = self.weight[part].abs() / deviations[part, None, None]
        return scores if self.zero is None else scores.masked_fill_(self.zero[part].unsqueeze(1), 0.0)

    def removed(self, mask: Tensor, part: slice = slice(None)) -> Tensor:
        """Which weights of some inputs go: those outside the mask, and those that are 0 in the dense layer.

        A mask may have to count such zeros as kept.
        """
        return ~mask[part] if self.zero is None else ~mask[part] | self.zero[part].unsqueeze(1)


Solve = Callable[[InputBlock], tuple[Tensor, Tensor]]
"""A function that chooses what a block keeps, and changes its weights in place so that the kept ones make up for the
rest. Setting the removed weights to zero is left to the caller.

It returns the mask (b, levels, d_out), True where a weight stays, and the errors e (b, levels, d_out): the inputs
behind the block are to be updated by `-U[block, behind]^T e`.
"""


def keep_largest(scores: Tensor, kept: Sequence[int]) -> Tensor:
    """Keep exactly so many of the largest scores at each level; of equal ones the last stay.

    A histogram of the leading bits finds the bin of the last one to stay, so that only the few scores in it need
    sorting: that takes a quarter of the time of sorting them all.

    Args:
        scores: (b, levels, d_out), not negative.
        kept: How many stay at each level.

    Returns:
        (b, levels, d_out) bool, True where one stays.
    """
    levels, size = len(kept), 1 << (31 - LOW_BITS)
    bins = scores.float().view(torch.int32) >> LOW_BITS  # floats that are not negative sort as their bits do
    offsets = torch.arange(levels, dtype=torch.int32, device=scores.device).unsqueeze(1) * size
    histogram = torch.bincount((bins + offsets).flatten(), minlength=levels * size).view(levels, size)
    above = histogram.flip(1).cumsum(1).flip(1) - histogram  # scores in higher bins
    counts = torch.tensor(kept, device=scores.device).unsqueeze(1)
    edge = (above > counts).sum(1, keepdim=True)
    mask, at_edge = bins > edge, bins == edge
    for level, count in enumerate((counts - above.gather(1, edge)).flatten().tolist()):
        inputs, outputs = at_edge[:, level].nonzero(as_tuple=True)
        stay = ascending(scores[inputs, level, outputs])[len(inputs) - count :]
        mask[inputs[stay], level, outputs[stay]] = True
    return mask


def keep_patterned(scores: Tensor, kept: Sequence[int]) -> Tensor:
    """Keep the largest scores of one group at each level and output.

    Args:
        scores: (of, levels, d_out).
        kept: How many of the group stay at each level.

    Returns:
        (of, levels, d_out) bool, True where one stays.
    """
    counts = torch.tensor(kept, device=scores.device)
    return rank_in_groups(scores, 0) >= len(scores) - counts[:, None]


def quotas(kept: int, d_out: int, dead: Tensor, block: int, zero: Tensor | None = None) -> list[int]:
    """How many weights each block keeps: in proportion to its weights that are not 0.

    Dead inputs keep none before all others are full, and weights that are 0 already are kept last of all.

    Args:
        kept: How many weights of the layer stay.
        d_out: Outputs of the layer.
        dead: (d_in,) bool, True for inputs that were always 0.
        block: Inputs per block; the last block may have fewer.
        zero: (d_in, d_out) bool, weights that are 0 in the dense layer.

    Returns:
        One number a block; they sum to `kept`.
    """
    valued = d_out - (torch.zeros_like(dead, dtype=torch.int64) if zero is None else zero.sum(1))
    found = [0] * len(dead.split(block))
    for counts in (valued * ~dead, valued * dead, d_out - valued):
        sizes = [int(part.sum()) for part in counts.split(block)]
        taken = min(kept, sum(sizes))
        found = [have + more for have, more in zip(found, _spread(taken, sizes), strict=True)]
        kept -= taken
    return found


def _spread(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`, of which it is no more than the sum: running totals are rounded down."""
    parts, given, end = [], 0, 0
    for size in sizes:
        end += size
        until = total * end // max(1, sum(sizes))
        parts.append(until - given)
        given = until
    return parts


def sweep(
    W: Tensor,
    U: Tensor,
    dead: Tensor,
    kept: Sequence[int],
    of: int | None,
    block: int,
    solve: Solve,
    zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune all levels, block by block from the left.

    Args:
        W: (d_in, d_out) where all levels start from.
        U: (d_in, d_in) upper triangular, with U^T U = H^-1.
        dead: (d_in,) bool, True for inputs that were always 0, whose weights W are 0.
        kept: Weights that each level keeps: of the layer, or, for N:M, of each group.
        of: Inputs in a group; d_in is a multiple of it. None where unstructured.
        block: Inputs per block; for N:M a multiple of `of`.
        solve: How a block is pruned.
        zero: (d_in, d_out) bool, weights that are 0 in the dense layer; None where there are none.

    Returns:
        The masks, bool, and the weights, zero where the mask is False or `zero` is True: both (d_in, levels, d_out).
    """
    (d_in, d_out), levels = W.shape, len(kept)
    work = W.repeat(1, levels)
    mask = torch.empty(d_in, levels, d_out, dtype=torch.bool, device=W.device)
    starts = range(0, d_in, block)
    counts = [[count] * len(starts) if of else quotas(count, d_out, dead, block, zero) for count in kept]
    for index, start in enumerate(starts):
        part, behind = slice(start, min(start + block, d_in)), slice(start + block, d_in)
        weight = work[part].view(-1, levels, d_out)
        here = InputBlock(
            weight, U[part, part], [one[index] for one in counts], of, None if zero is None else zero[part]
        )
        mask[part], errors = solve(here)
        weight.masked_fill_(here.removed(mask[part]), 0.0)
        work[behind].addmm_(U[part, behind].T, errors.view(len(weight), -1), alpha=-1)
    return mask, work.view(d_in, levels, d_out)


@dataclass(frozen=True)
class BlockwisePruner(FittedPruner, WeightPruner):
    """What pruners that go block by block share.

    Attributes:
        damping: Ridge towards the dense weight, as a fraction of the Hessian's mean diagonal.
        block: Inputs per block; rounded down to a multiple of a pattern's M, but at least M.
        refit: Steps of conjugate gradients for the weights that stay (`local_prune.methods.shared.refit`); 0 leaves
            them as the method does.
    """

    damping: float = 0.01
    block: int = 128
    refit: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, "0.01")
        if self.block < 1:
            raise InputError(
                f"prune.pruner.block={self.block} must be at least 1 input; 32 to 128 are the usual choice"
            )
        if not 0 <= self.refit <= MOST_STEPS:
            raise InputError(
                f"prune.pruner.refit={self.refit} must be 0 to {MOST_STEPS:,} steps; 4 do most of what can be done"
            )

    @abstractmethod
    def solve(self, block: InputBlock) -> tuple[Tensor, Tensor]:
        """Prune one block: a `Solve`."""
        raise NotImplementedError

    def fitted(self, problem: Damped, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """As many levels together as fit into the working memory, each ended by a few steps of refitting."""
        assert isinstance(task.statistics, LeastSquares)
        dead = task.statistics.upper.diagonal() <= 0
        found: dict[int, Candidate] = {}
        U, target, zero = problem.factor.upper_of_inverse(), problem.solution, zeros_of(task.dense)
        for levels, of, counts in self._batches(task.dense, kept):
            block = self.block if of is None else max(of, self.block // of * of)
            masks, weights = sweep(target, U, dead, counts, of, block, self.solve, zero)
            if self.refit:
                free = masks if zero is None else masks & ~zero.unsqueeze(1)
                refit(problem.hessian, target, free, weights, self.refit)
            for index, level in enumerate(levels):
                weight = weights[:, index].T.to(task.dense.dtype).contiguous()
                found[level] = Weights(masks[:, index].T.contiguous(), weight)
        return [found[level] for level in range(len(kept))]

    def _batches(self, dense: Tensor, kept: Sequence[int]) -> list[tuple[list[int], int | None, list[int]]]:
        """Which levels run together.

        Returns:
            For each batch the levels, the M of their patterns (None where unstructured), and how many weights each
            level keeps, of the layer or of a group.
        """
        by_size: dict[int | None, list[tuple[int, int]]] = {}
        for level, count in enumerate(kept):
            pattern: Pattern | None = pattern_of(count, dense.numel(), self.patterns) if self.patterns else None
            of, keep = (pattern.of, pattern.keep) if pattern else (None, count)
            by_size.setdefault(of, []).append((level, keep))
        most = max(1, WORKING // (4 * dense.numel()))
        batches = []
        for of, levels in by_size.items():
            for start in range(0, len(levels), most):
                indices, counts = zip(*levels[start : start + most], strict=True)
                batches.append((list(indices), of, list(counts)))
        return batches
