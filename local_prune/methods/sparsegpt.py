"""SparseGPT (Frantar & Alistarh 2023): weights go column by column, and the columns to their right make up for it.

With U upper triangular and U^T U = H^-1 (algorithm 1 of the paper), pruning w_j costs the error `e = w_j / U_jj`, and
`e U_j,j+1:` is taken from the weights to its right. Shapes are those of `local_prune.methods.shared.blockwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.blockwise import BlockwisePruner, InputBlock, keep_largest, keep_patterned

# Columns whose errors reach each other one by one; errors of earlier columns come as one matrix product.
STEP = 16


def solve_columns(block: InputBlock) -> tuple[Tensor, Tensor]:
    """SparseGPT's `Solve`: the error of each column is taken from the columns to its right.

    The unstructured mask is chosen at the start of the block, that of a group of N:M when its first column is reached.
    A column gathers the errors of the columns before it when its turn comes, so that only one column is written.
    """
    rows = block.weight.view(len(block.weight), -1)
    U, scale = block.U, block.U.diagonal()
    errors, removed = torch.empty_like(rows), torch.empty_like(rows)
    mask = torch.empty_like(block.weight, dtype=torch.bool)
    if block.of is None:
        mask = keep_largest(block.scores(scale), block.kept)
        torch.div(block.removed(mask).view_as(rows), scale.unsqueeze(1), out=removed)
    step = block.of or STEP
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        rows[part].addmm_(U[:start, part].T, errors[:start], alpha=-1)
        if block.of is not None:
            mask[part] = keep_patterned(block.scores(scale, part), block.kept)
            torch.div(block.removed(mask, part).view_as(rows[part]), scale[part].unsqueeze(1), out=removed[part])
        for j in range(start, min(start + step, len(rows))):
            rows[j].addmv_(errors[start:j].T, U[start:j, j], alpha=-1)
            torch.mul(rows[j], removed[j], out=errors[j])
    return mask, errors.view_as(block.weight)


@dataclass(frozen=True)
class SparseGptPruner(BlockwisePruner):
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1): `prune=sparsegpt`.

    Attributes:
        block: Inputs whose weights are compared with each other, the paper's B_s. It makes no difference for N:M.
    """

    name: ClassVar[str] = "sparsegpt"
    version: ClassVar[int] = 1

    def solve(self, block: InputBlock) -> tuple[Tensor, Tensor]:
        """Prune the columns one after the other."""
        return solve_columns(block)
