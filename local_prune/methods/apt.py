"""Joint removal of pruned weights (APT: "Pruning Foundation Models for High Accuracy without Retraining", Zhao et al.
2024).

SparseGPT removes one weight after the other, and what it takes from a kept weight to the left is never made up for.
Here the pruned weights P of an output in a block go together, the multiple-removal problem of the paper: with A the
inverse Hessian of the inputs from the start of the block on, the least error and the change of all those weights that
reaches it are

    1/2 w_P [A_PP]^-1 w_P^T     and     -w_P [A_PP]^-1 A_P,:

The shapes, and U, are those of `local_prune.methods.shared.blockwise`: A = U^T U for the part of U from the block on,
so the change is `-U^T e` with the errors `e = U z` of the block, where z solves `A_PP z_P = w_P` and is 0 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.blockwise import BlockwisePruner, InputBlock, keep_largest, keep_patterned

# The most choices for a group of N:M that are all compared by their joint error: as many as 4:8 has.
SUBSETS = 70
# Numbers in the matrices that are solved together: their 2 MiB stay in the caches.
SYSTEMS = 1 << 19


def joint_errors(W: Tensor, U: Tensor, removed: Tensor) -> Tensor:
    """The errors e of the exact joint removal for many systems: e = U z, A_PP z_P = w_P, z = 0 outside P.

    Args:
        W: (b, systems), one system an output and level.
        U: (b, b) upper triangular, with A = U^T U.
        removed: (b, systems) bool, P.

    Returns:
        (b, systems).
    """
    size = len(W)
    # Sets of inputs that are smaller than others of their batch are padded with rows of the identity.
    extended = torch.block_diag(U.T @ U, torch.eye(size, dtype=U.dtype, device=U.device))
    weight = torch.cat([W, torch.zeros_like(W)]).T
    errors = torch.zeros_like(W)
    # Systems of like size are solved together, padded to the largest.
    counts, ranked = removed.sum(0).sort(descending=True, stable=True)
    sizes, start = counts.tolist(), 0
    while start < len(sizes) and sizes[start] > 0:
        chosen = ranked[start : start + max(1, SYSTEMS // sizes[start] ** 2)]
        index = _padded(removed[:, chosen].T, sizes[start])
        flat = index.unsqueeze(2) * (2 * size) + index.unsqueeze(1)
        lower = torch.linalg.cholesky(torch.take(extended, flat))  # not by LU: see local_prune.methods.obs
        solved = torch.cholesky_solve(weight[chosen].gather(1, index).unsqueeze(2), lower).squeeze(2)
        z = W.new_zeros(len(chosen), 2 * size).scatter_(1, index, solved)
        errors[:, chosen] = U @ z[:, :size].T
        start += len(chosen)
    return errors


def _padded(removed: Tensor, width: int) -> Tensor:
    """Where each row is True, and behind that, up to `width`, distinct rows of the identity.

    Args:
        removed: (n, b) bool.
        width: The most that a row has.

    Returns:
        (n, width) int64: below b for a column of the row, b and above for a row of the identity.
    """
    n, size = removed.shape
    index = torch.arange(size, size + width, device=removed.device).repeat(n, 1)
    rows, columns = removed.nonzero(as_tuple=True)
    place = removed.cumsum(1)[rows, columns] - 1
    index[rows, place] = columns
    return index


def keep_least_loss(group: Tensor, A: Tensor, keep: int, zero: Tensor | None = None) -> Tensor:
    """Choose the `keep` inputs whose complement P has the least joint loss w_P [A_PP]^-1 w_P^T, by trying all of them.

    Args:
        group: (of, n) weights.
        A: (of, of), the inverse Hessian of the group's inputs.
        keep: How many stay.
        zero: (of, n) bool, weights that go in any case: P has as many of them as it can.

    Returns:
        (of, n) bool, True where a weight stays.
    """
    of = len(group)
    subsets = torch.tensor(list(combinations(range(of), of - keep)), device=A.device)  # (subsets, r)
    matrices = A[subsets.unsqueeze(2), subsets.unsqueeze(1)]
    identity = torch.eye(of - keep, dtype=A.dtype, device=A.device).expand_as(matrices)
    # The loss is ||L^-1 w_P||^2.
    roots = torch.linalg.solve_triangular(torch.linalg.cholesky(matrices), identity, upper=False)
    spread = A.new_zeros(*subsets.shape, of).scatter_(2, subsets.unsqueeze(1).expand_as(roots), roots)
    losses = (spread.flatten(0, 1) @ group).view(*subsets.shape, -1).square().sum(1)
    stays = torch.ones(len(subsets), of, dtype=torch.bool, device=A.device).scatter_(1, subsets, False)
    if zero is not None:
        taken = (~stays).to(A.dtype) @ zero.to(A.dtype)  # (subsets, n)
        losses.masked_fill_(taken < zero.sum(0).clamp_max(of - keep), torch.inf)
    return stays[losses.argmin(0)].T


def choose(block: InputBlock) -> Tensor:
    """Choose what stays, before anything of the block is removed: (b, levels, d_out) bool.

    Unstructured, and in groups with too many choices, weights are compared by what removing each alone costs,
    w_j^2 / A_jj (the paper's mask for large problems). In other groups of N:M all choices are compared by the exact
    joint loss of the weights that they remove.
    """
    A = block.U.T @ block.U
    deviations = A.diagonal().sqrt()
    if block.of is None:
        return keep_largest(block.scores(deviations), block.kept)
    mask = torch.empty_like(block.weight, dtype=torch.bool)
    for start in range(0, len(mask), block.of):
        part = slice(start, start + block.of)
        if max(comb(block.of, keep) for keep in block.kept) > SUBSETS:
            mask[part] = keep_patterned(block.scores(deviations, part), block.kept)
            continue
        for level, keep in enumerate(block.kept):
            zero = None if block.zero is None else block.zero[part]
            mask[part, level] = keep_least_loss(block.weight[part, level], A[part, part], keep, zero)
    return mask


def solve_jointly(block: InputBlock) -> tuple[Tensor, Tensor]:
    """Joint removal as a `local_prune.methods.shared.blockwise.Solve`: every removed weight of the block at once."""
    mask = choose(block)
    rows = block.weight.view(len(mask), -1)
    errors = joint_errors(rows, block.U, block.removed(mask).view(len(mask), -1))
    rows.addmm_(block.U.T, errors, alpha=-1)
    return mask, errors.view_as(block.weight)


@dataclass(frozen=True)
class AptPruner(BlockwisePruner):
    """Joint removal block by block (Zhao et al. 2024): `prune=apt`.

    Attributes:
        block: Inputs per block; on random layers 64 lost less than 32, and than 128 where most weights go.
    """

    name: ClassVar[str] = "apt"
    version: ClassVar[int] = 1

    block: int = 64

    def solve(self, block: InputBlock) -> tuple[Tensor, Tensor]:
        """Remove all weights of the block at once."""
        return solve_jointly(block)
