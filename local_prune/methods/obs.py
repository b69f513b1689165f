"""Second-order structured pruning of a projection: whole groups of input columns go, the rest is refitted.

The group whose removal costs the output least goes first (Optimal Brain Surgeon with groups: ZipLM, Kurtic et al. 2023,
section 3.1; Týr-the-Pruner, Li et al. 2025, section 3.1, adds the first-order term). One greedy trajectory to the
sparsest level visits all levels on its way, so they are nested and cost one run. Pure functions over tensors; W is
(d_in, d_out) here, that is the transpose of a linear layer's weight, H is (d_in, d_in), G = X^T T is (d_in, d_out).

For weights W = H^-1 G that solve the least-squares problem, removing the rows P of W costs exactly

    1/2 tr(W_P^T [(H^-1)_PP]^-1 W_P)            (second order)

and leaves W - (H^-1)_:P [(H^-1)_PP]^-1 W_P as the solution on the kept rows. The first-order term |sum(W_P * G_P)| is
what the group contributes to the energy of the output, as sum(W * G) = ||X W||^2 at every solution; G does not change
along the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_prune.methods.shared.fitted import FittedPruner
from local_prune.methods.shared.members import MembersPruner
from local_prune.pruner import Task
from local_prune.statistics import Damped, check_number
from supernet.candidates import Candidate, Members, member_columns

# What is left is gathered as soon as one of so many rows of the working set is gone.
GATHERED = 6
# Removals between two updates of the whole inverse: their corrections are applied as one matrix product.
REMOVALS = 32


def removal_order(hessian_inverse: Tensor, moment: Tensor, width: int, count: int, first_order: float = 0.0) -> Tensor:
    """Greedy order of removal of `count` groups of `width` neighbouring rows of W.

    Args:
        hessian_inverse: Inverse of the damped Hessian, (d_in, d_in).
        moment: (d_in, d_out), damped G.
        width: Rows per group; d_in is a multiple of it.
        count: Groups to remove.
        first_order: Weight of the first-order term.

    Returns:
        (count,) int64 group indices, the first to go first.
    """
    weight = hessian_inverse @ moment
    if width == 1:
        return _order_of_rows(hessian_inverse, weight, moment, count, first_order)
    return _order_of_groups(hessian_inverse, weight, moment, width, count, first_order)


def _order_of_rows(inverse: Tensor, weight: Tensor, moment: Tensor, count: int, first_order: float) -> Tensor:
    """Remove single rows, exactly one at a time; the rank-1 updates of H^-1 and W are kept apart for REMOVALS steps.

    Within a block the current matrices are `inverse - U^T U` and `weight - U^T V`; a step reads one row of each instead
    of writing d_in^2 numbers. Removed rows stay in the working set, and are passed over, until they are a good part of
    it: gathering what is left costs as much as several blocks.
    """
    inverse, weight = inverse.clone(), weight.clone()
    names = torch.arange(len(inverse), device=inverse.device)
    gone = torch.zeros_like(names, dtype=torch.bool)
    order: list[Tensor] = []
    while count > 0:
        if int(gone.sum()) * GATHERED > len(gone):
            left = (~gone).nonzero().flatten()
            inverse = inverse.index_select(0, left).index_select(1, left)
            weight, moment, names = weight[left], moment[left], names[left]
            gone = torch.zeros_like(names, dtype=torch.bool)
        removed, U, V = _remove_rows(inverse, weight, moment, min(REMOVALS, count), first_order, gone)
        order.append(names[removed])
        gone[removed] = True
        count -= len(removed)
        inverse.addmm_(U.T, U, alpha=-1)
        weight.addmm_(U.T, V, alpha=-1)
    return torch.cat(order) if order else names[:0]


def _remove_rows(
    inverse: Tensor, weight: Tensor, moment: Tensor, steps: int, first_order: float, gone: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove `steps` rows; the matrices after that are `inverse - U^T U` and `weight - U^T V`.

    `gone` (d,) bool is True for rows that were removed before.

    Returns:
        The indices of the rows (steps,), U (steps, d) and V (steps, d_out).
    """
    U, V = inverse.new_zeros(steps, len(inverse)), weight.new_zeros(steps, weight.shape[1])
    diagonal = inverse.diagonal().masked_fill(gone, 1.0)  # never read again, but must not divide by zero
    norms = weight.square().sum(1).masked_fill_(gone, torch.inf)  # ||W_j||^2; infinite for rows that are gone
    energy = (weight * moment).sum(1)  # W_j . G_j
    removed = torch.empty(steps, dtype=torch.int64, device=inverse.device)
    for t in range(steps):
        score = 0.5 * norms / diagonal + first_order * energy.abs() if first_order else norms / diagonal
        row = score.argmin()
        pivot = diagonal[row].clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()
        before = U[:t, row]
        u = torch.addmv(inverse[row], U[:t].T, before, alpha=-1).div_(pivot)
        v = torch.addmv(weight[row], V[:t].T, before, alpha=-1).div_(pivot)
        along = torch.addmv(weight @ v, U[:t].T, V[:t] @ v, alpha=-1)  # current W_j . v
        norms += u * (u * v.dot(v) - 2.0 * along)
        if first_order:
            energy -= u * (moment @ v)
        diagonal -= u.square()
        diagonal[row], norms[row] = 1.0, torch.inf
        U[t], V[t], removed[t] = u, v, row
    return removed, U, V


def _order_of_groups(
    inverse: Tensor, weight: Tensor, moment: Tensor, width: int, count: int, first_order: float
) -> Tensor:
    """Remove groups of several rows. They are few and wide, so H^-1 and W are updated, and shrink, at each removal.

    All systems are positive definite and are solved by Cholesky, (H^-1)_PP = L L^T. Batched LU, which
    `torch.linalg.solve` uses, gives wrong numbers in a process where anybody has called `torch.set_num_threads`
    (docs/experiments/2026-11-24-set-num-threads.md).
    """
    names = torch.arange(len(inverse) // width, device=inverse.device)
    order: list[Tensor] = []
    for _ in range(count):
        left = len(names)
        blocks = (
            inverse.view(left, width, left, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        )  # (left, width, width)
        W, G = weight.view(left, width, -1), moment.view(left, width, -1)
        lower = torch.linalg.cholesky(blocks)
        halves = torch.linalg.solve_triangular(lower, W, upper=False)  # ||L^-1 W_P||^2 = tr(W_P^T [(H^-1)_PP]^-1 W_P)
        score = 0.5 * halves.square().sum((1, 2)) + first_order * (W * G).sum((1, 2)).abs()
        group = int(score.argmin())
        order.append(names[group])
        keep = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        keep[group * width : (group + 1) * width] = False
        across = torch.linalg.solve_triangular(lower[group], inverse[~keep][:, keep], upper=False)  # (width, rows kept)
        inverse = torch.addmm(inverse[keep][:, keep], across.T, across, alpha=-1)
        weight = torch.addmm(weight[keep], across.T, halves[group], alpha=-1)
        moment, names = moment[keep], names[names != names[group]]
    return torch.stack(order) if order else names[:0]


def solve_levels(
    hessian: Tensor, moment: Tensor, order: Tensor, kept: list[int], width: int
) -> list[tuple[Tensor, Tensor]]:
    """The exact least-squares weights of every level of a trajectory, from one factorisation.

    With the rows sorted so that the last to go comes first, every level keeps a leading part: H = L L^T and the forward
    substitution are shared, and a level costs one triangular solve.

    Args:
        hessian: (d_in, d_in) damped H.
        moment: (d_in, d_out) damped G.
        order: (r,) groups in the order of their removal.
        kept: Groups kept at each level, each at least d_in / width - r.
        width: Rows per group.

    Returns:
        For each level the kept groups (k,), rising, and their weights (k * width, d_out).
    """
    groups = len(hessian) // width
    never = torch.ones(groups, dtype=torch.bool, device=hessian.device)
    never[order] = False
    ranking = torch.cat([never.nonzero().flatten(), order.flip(0)])  # the most valuable first
    ranking = ranking[: max(kept, default=0)]
    rows = member_columns(ranking, width)
    factor = torch.linalg.cholesky(hessian[rows][:, rows])
    forward = torch.linalg.solve_triangular(factor, moment[rows], upper=False)
    levels = []
    for count in kept:
        k = count * width
        weight = torch.linalg.solve_triangular(factor[:k, :k].T, forward[:k], upper=True)
        groups_kept, position = ranking[:count].sort()
        index = member_columns(position, width)
        levels.append((groups_kept, weight[index]))
    return levels


@dataclass(frozen=True)
class ObsPruner(FittedPruner, MembersPruner):
    """Optimal Brain Surgeon for groups of columns, with exact refit: `prune=obs`.

    Attributes:
        damping: Ridge towards the dense weight, as a fraction of the Hessian's mean diagonal.
        first_order: Weight of the first-order term in the score (0 is pure second order, 1 is Týr's rule).
    """

    name: ClassVar[str] = "obs"
    version: ClassVar[int] = 2

    damping: float = 0.01
    first_order: float = 0.0

    def __post_init__(self) -> None:
        check_number("damping", self.damping, "0.01")
        check_number("first_order", self.first_order, "0", zero=True)

    def fitted(self, problem: Damped, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One greedy trajectory, and the optimum at each of its levels."""
        removed = task.dense.shape[1] // task.width - min(kept)
        order = removal_order(problem.inverse, problem.moment, task.width, removed, self.first_order)
        levels = solve_levels(problem.hessian, problem.moment, order, list(kept), task.width)
        return [Members(groups, weight.T.to(task.dense.dtype).contiguous()) for groups, weight in levels]
