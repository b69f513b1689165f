"""What is accumulated over the calibration tokens for the projection of one unit. Shapes: X (tokens, d_in), T (tokens, d_out)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from supernet.errors import InputError

log = logging.getLogger(__name__)

PANELS = 6  # of a Gram matrix: its upper triangle takes (PANELS + 1) / (2 PANELS) of the products of the whole


def add_gram(gram: Tensor, X: Tensor) -> None:
    """Add X^T X to the upper triangle of `gram` (d, d), panel by panel; `symmetric` gives the whole. X: (tokens, d)."""
    step = -(-len(gram) // PANELS)
    for start in range(0, len(gram), step):
        gram[start : start + step, start:].addmm_(X[:, start : start + step].T, X[:, start:])


def symmetric(gram: Tensor) -> Tensor:
    """The whole of a matrix of which only the upper triangle is up to date."""
    return gram.triu() + gram.triu(1).T


@dataclass
class LeastSquares:
    """The least-squares problem `min_W ||X W - T||^2` of one projection, summed over batches in float32.

    Attributes:
        upper: H = X^T X, (d_in, d_in); only its upper triangle, see `hessian`.
        moment: G = X^T T, (d_in, d_out).
        energy: ||T||^2, what errors are relative to.
        tokens: Rows of X so far.
    """

    upper: Tensor
    moment: Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, d_in: int, d_out: int, device: torch.device | str = "cpu") -> LeastSquares:
        """Before any batch."""
        return cls(torch.zeros(d_in, d_in, device=device), torch.zeros(d_in, d_out, device=device))

    def add(self, inputs: Tensor, target: Tensor | None = None) -> None:
        """Add a batch: X (tokens, d_in) and T (tokens, d_out), of any float dtype; without T see `target_own_output`."""
        X = inputs.float()
        add_gram(self.upper, X)
        self.tokens += len(X)
        if target is not None:
            T = target.float()
            self.moment.addmm_(X.T, T)
            self.energy += float(T.square().sum())

    @property
    def hessian(self) -> Tensor:
        """H = X^T X, (d_in, d_in)."""
        return symmetric(self.upper)

    def target_own_output(self, dense: Tensor) -> None:
        """Set T = X W for the dense W (d_in, d_out), after all batches: G = H W needs no pass over the tokens."""
        self.moment = self.hessian @ dense.float()
        self.energy = float((dense.float() * self.moment).double().sum())

    def errors(self, levels: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """Relative squared output errors ||X_k W_k - T||^2 / ||T||^2.

        Args:
            levels: For each level the columns it keeps (k,), and its weight (k, d_out).
        """
        hessian, errors = self.hessian, []
        for kept, weight in levels:
            H, G, W = hessian[kept][:, kept], self.moment[kept], weight.float()
            residual = self.energy - 2.0 * float((W * G).double().sum()) + float((W * (H @ W)).double().sum())
            errors.append(max(0.0, residual / self.energy) if self.energy else 0.0)
        return errors


@dataclass(frozen=True)
class Damped:
    """The problem with a ridge towards the dense weight, which makes it positive definite.

    `min ||X W - T||^2 + damping ||W - W_dense||^2` has the normal equations `hessian W = moment`.
    """

    hessian: Tensor  # (d_in, d_in)
    moment: Tensor  # (d_in, d_out)
    inverse: Tensor  # (d_in, d_in)


def damped(problem: LeastSquares, dense: Tensor, damping: float, where: str) -> Damped:
    """Add `damping` times the mean diagonal, tenfold again with a warning while Cholesky fails.

    Args:
        problem: The sums over all calibration tokens.
        dense: (d_in, d_out), the dense weight transposed. Inputs that were never active get zero weight.
        damping: Fraction of the mean diagonal of H.
        where: Unit name, for messages.
    """
    problem_hessian = problem.hessian
    diagonal = problem_hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all() and torch.isfinite(problem.moment).all()):
        raise InputError(f"{where}: activations are not finite; check the model's weights, or use dtype=float32")
    mean = float(diagonal.mean()) or 1.0
    anchor = dense.float() * (diagonal > 0).unsqueeze(1)
    for attempt in range(6):
        ridge = damping * 10.0**attempt * mean
        hessian = problem_hessian.clone()
        hessian.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(hessian)
        if int(info) == 0:
            if attempt:
                log.warning("%s: Cholesky failed; damping raised from %g to %g", where, damping, damping * 10.0**attempt)
            return Damped(hessian, problem.moment + ridge * anchor, torch.cholesky_inverse(factor))
    raise InputError(
        f"{where}: the Hessian is not positive definite even with damping {damping * 1e5:g}; use more calibration text"
    )
