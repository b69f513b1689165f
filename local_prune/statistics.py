"""Sums over the calibration tokens that methods prune by, and the least-squares problems that follow from them.

A layer's inputs are X (tokens, d_in), and what its output should be is T (tokens, d_out). `Moments` serves methods that
only score, `LeastSquares` those that fit the weights that they keep.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from supernet.errors import InputError

log = logging.getLogger(__name__)

R = TypeVar("R")

ATTEMPTS = 6  # how often a factorisation is tried, each time with ten times the damping of the time before
ROWS = 1024  # how many rows of X are float64 at a time
LARGEST = (
    1e9  # the most that one term may weigh against another by a setting: beyond, float32 keeps nothing of the other
)
# Panels that a Gram matrix is computed in: its upper triangle takes (PANELS + 1) / (2 PANELS) of the whole's products.
PANELS = 6


def check_number(name: str, value: float, usual: str, zero: bool = False) -> None:
    """Raise InputError unless the setting `prune.pruner.<name>` is finite, at most `LARGEST`, and above 0.

    Args:
        name: The name of the setting.
        value: What the user gave.
        usual: The usual choice, which the message names.
        zero: Whether 0 is allowed, too.
    """
    if not (0 <= value if zero else 0 < value) or not math.isfinite(value):
        limit = "not below 0" if zero else "above 0"
        raise InputError(f"prune.pruner.{name}={value} must be finite and {limit}; {usual} is the usual choice")
    if value > LARGEST:
        raise InputError(f"prune.pruner.{name}={value} must be at most {LARGEST:,.0f}; {usual} is the usual choice")


def finite(scores: Tensor, where: str, what: str = "activations") -> Tensor:
    """Return the scores; raise InputError if one is NaN or infinite. `what` names what they were computed from."""
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{where}: {what} are not finite; check the model's weights, or use dtype=float32")
    return scores


def add_gram(gram: Tensor, X: Tensor) -> None:
    """Add X^T X to the upper triangle of `gram` (d, d), panel by panel, for X (tokens, d).

    What is below the triangle is not up to date then; `symmetric` gives the whole matrix.
    """
    step = -(-len(gram) // PANELS)
    for start in range(0, len(gram), step):
        gram[start : start + step, start:].addmm_(X[:, start : start + step].T, X[:, start:])


def symmetric(gram: Tensor) -> Tensor:
    """Return the whole of a symmetric matrix of which only the upper triangle is up to date."""
    return gram.triu() + gram.triu(1).T


def zeros_of(dense: Tensor) -> Tensor | None:
    """Return where a dense weight (d_out, d_in) is 0 already, (d_in, d_out) bool; None where no weight is.

    A model may be sparse before it is pruned. Methods that fit weights keep its zeros: these weights are removed first,
    and are zero at every level.
    """
    zero = dense.T == 0
    return zero if bool(zero.any()) else None


@dataclass
class Moments:
    """Sums over the calibration tokens of each input alone, for methods that only score.

    Attributes:
        total: The sum of x, (d_in,) float64.
        squares: The sum of x^2, (d_in,) float64.
        absolute: The sum of |x|, (d_in,) float64.
        tokens: How many rows of X have been added.
    """

    total: Tensor
    squares: Tensor
    absolute: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, d_in: int, device: torch.device | str = "cpu") -> Moments:
        """Return the sums before any batch was added."""
        total, squares, absolute = torch.zeros(3, d_in, dtype=torch.float64, device=device)
        return cls(total, squares, absolute)

    def add(self, inputs: Tensor) -> None:
        """Add a batch: X (tokens, d_in), of any float dtype."""
        for rows in inputs.split(ROWS):
            X = rows.double()  # squares in float32 would leave nothing of a variance that is small beside the mean
            self.total += X.sum(0)
            self.squares += X.square().sum(0)
            self.absolute += X.abs().sum(0)
        self.tokens += len(inputs)

    def merge(self, other: Moments) -> None:
        """Add the sums over other tokens."""
        self.total += other.total
        self.squares += other.squares
        self.absolute += other.absolute
        self.tokens += other.tokens

    @property
    def norms(self) -> Tensor:
        """The norm of each input over the tokens, ||X_j||_2, (d_in,) float32."""
        return self.squares.sqrt().float()

    @property
    def mean(self) -> Tensor:
        """The mean of each input over the tokens, (d_in,) float32."""
        return (self.total / max(1, self.tokens)).float()

    @property
    def variance(self) -> Tensor:
        """The variance of each input over the tokens, (d_in,) float32."""
        mean = self.total / max(1, self.tokens)
        return (self.squares / max(1, self.tokens) - mean.square()).clamp_min(0.0).float()


@dataclass
class LeastSquares:
    """The least-squares problem `min_W ||X W - T||^2` of one linear layer, summed over batches in float32.

    W (d_in, d_out) is the layer's weight, transposed.

    Attributes:
        upper: H = X^T X, (d_in, d_in), of which only the upper triangle is up to date; `hessian` is the whole.
        moment: G = X^T T, (d_in, d_out).
        energies: ||T_o||^2 of each output, (d_out,) float64, which errors are relative to.
        tokens: How many rows of X have been added.
        own_output: Whether T is X W for the dense W, which is then the solution.
    """

    upper: Tensor
    moment: Tensor
    energies: Tensor
    tokens: int = 0
    own_output: bool = False
    # Factorisations by damping, which layers with the same inputs share.
    _factors: dict[float, Factor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, d_in: int, d_out: int, device: torch.device | str = "cpu") -> LeastSquares:
        """Return the sums before any batch was added."""
        energies = torch.zeros(d_out, dtype=torch.float64, device=device)
        return cls(torch.zeros(d_in, d_in, device=device), torch.zeros(d_in, d_out, device=device), energies)

    def add(self, inputs: Tensor, target: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: X, (tokens, d_in), of any float dtype.
            target: T, (tokens, d_out), of any float dtype. It is left out of all batches where T is the dense layer's
                own output; then `target_own_output` sets it in the end.
        """
        X = inputs.float()
        add_gram(self.upper, X)
        self.tokens += len(X)
        if target is not None:
            T = target.float()
            self.moment.addmm_(X.T, T)
            self.energies += T.square().sum(0)

    def merge(self, other: LeastSquares) -> None:
        """Add the sums over other tokens. `target_own_output` may be called after the last merge only."""
        assert not (self.own_output or other.own_output or self._factors)
        self.upper += other.upper
        self.moment += other.moment
        self.energies += other.energies
        self.tokens += other.tokens

    @property
    def energy(self) -> float:
        """||T||^2, summed over all outputs."""
        return float(self.energies.sum())

    @property
    def hessian(self) -> Tensor:
        """H = X^T X, (d_in, d_in)."""
        return symmetric(self.upper)

    def target_own_output(self, dense: Tensor) -> None:
        """Set T = X W for the dense W (d_in, d_out), after all batches: G = H W needs no pass over the tokens."""
        self.moment = self.hessian @ dense.float()
        self.energies = (dense.float() * self.moment).double().sum(0)
        self.own_output = True

    def outputs(self, chosen: slice) -> LeastSquares:
        """Return the problem of some of the outputs alone, such as one layer of several that share their inputs."""
        moment, energies = self.moment[:, chosen], self.energies[chosen]
        return LeastSquares(self.upper, moment, energies, self.tokens, self.own_output, self._factors)

    def errors(self, levels: Iterable[tuple[Tensor | slice, Tensor]]) -> list[float]:
        """Return the relative squared output error of each level, ||X_k W_k - T||^2 / ||T||^2.

        Args:
            levels: For each level the input columns that it keeps, (k,) or a slice, and its weight W_k, (k, d_out).
        """
        hessian, errors = self.hessian, []
        for kept, weight in levels:
            H, G, W = hessian[kept][:, kept], self.moment[kept], weight.float()
            residual = self.energy - 2.0 * float((W * G).double().sum()) + float((W * (H @ W)).double().sum())
            errors.append(max(0.0, residual / self.energy) if self.energy else 0.0)
        return errors

    def factor(self, damping: float, where: str, attempt: int = 0) -> Factor:
        """Return the factorisation of the damped Hessian. While it fails the damping is made tenfold, with a warning.

        Args:
            damping: What is added to the diagonal of H, as a fraction of its mean.
            where: The name of the unit, for messages.
            attempt: How often the damping is made tenfold from the start: above 0 only where something that follows
                from an earlier factorisation has failed.

        Raises:
            InputError: The largest damping is not enough, or activations are not finite.
        """
        known = self._factors.get(damping)
        if known is None or known.attempt < attempt:
            self._factors[damping] = known = _factor(self.hessian, damping, where, attempt)
        return known


@dataclass(frozen=True)
class Factor:
    """A damped Hessian `H + ridge I`, (d_in, d_in), and what methods need of its inverse."""

    hessian: Tensor
    ridge: float
    lower: Tensor  # L with L L^T = hessian
    attempt: int = 0  # how often the damping was made tenfold
    _uppers: list[Any] = field(default_factory=list)

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of the damped Hessian, (d_in, d_in)."""
        return torch.cholesky_inverse(self.lower)

    def upper_of_inverse(self, order: Tensor | None = None) -> Tensor:
        """Return the upper triangular U with U^T U = the inverse, its inputs sorted by `order` (d_in,) if given.

        U is what SparseGPT and GPTQ need: U[i:, i:]^T U[i:, i:] is the inverse of the Hessian of the inputs from i on.
        The U of the last call is kept, as layers with the same inputs ask for the same.
        """
        if self._uppers and _same(order, self._uppers[0]):
            known: Tensor = self._uppers[1]
            return known
        hessian = self.hessian if order is None else self.hessian[order][:, order]
        reverse = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # upper R with R R^T = hessian
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        upper: Tensor = torch.linalg.solve_triangular(reverse, identity, upper=True)
        self._uppers[:] = [order, upper]
        return upper


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _factor(hessian: Tensor, damping: float, where: str, first: int = 0) -> Factor:
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise _not_finite(where)
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(first, ATTEMPTS):
        ridge = damping * 10.0**attempt * mean
        raised = hessian.clone()
        raised.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(raised)
        if int(info) == 0:
            if attempt:
                log.warning(
                    "%s: Cholesky failed; damping raised from %g to %g", where, damping, damping * 10.0**attempt
                )
            return Factor(raised, ridge, lower, attempt)
    raise InputError(
        f"{where}: the Hessian is not positive definite even with damping {damping * 10.0 ** (ATTEMPTS - 1):g}; use "
        "more calibration text"
    )


def _not_finite(where: str) -> InputError:
    return InputError(f"{where}: activations are not finite; check the model's weights, or use dtype=float32")


@dataclass(frozen=True)
class Damped:
    """A least-squares problem with a ridge towards the dense weight, which makes it positive definite.

    The problem `min ||X W - T||^2 + ridge ||W - W_dense||^2` has the normal equations `hessian W = moment`.
    """

    factor: Factor
    moment: Tensor  # (d_in, d_out)
    known: Tensor | None = None  # the solution, where it is known without solving, which would round it

    @property
    def hessian(self) -> Tensor:
        """The damped Hessian, (d_in, d_in)."""
        return self.factor.hessian

    @property
    def inverse(self) -> Tensor:
        """The inverse of the damped Hessian, (d_in, d_in)."""
        return self.factor.inverse

    @property
    def solution(self) -> Tensor:
        """The optimum W where nothing is pruned, (d_in, d_out)."""
        return torch.cholesky_solve(self.moment, self.factor.lower) if self.known is None else self.known


def damped(problem: LeastSquares, dense: Tensor, damping: float, where: str, attempt: int = 0) -> Damped:
    """Add a ridge towards the dense weight to a problem, tenfold while the factorisation fails.

    Args:
        problem: The sums over all calibration tokens.
        dense: (d_in, d_out), the dense weight transposed. For inputs that were never active the ridge is towards 0.
        damping: The ridge, as a fraction of the mean diagonal of H.
        where: The name of the unit, for messages.
        attempt: How often the damping is made tenfold from the start.

    Raises:
        InputError: The largest damping is not enough, or activations are not finite.
    """
    factor = problem.factor(damping, where, attempt)
    if not bool(torch.isfinite(problem.moment).all()):
        raise _not_finite(where)
    anchor = dense.float() * (problem.upper.diagonal() > 0).unsqueeze(1)
    return Damped(factor, problem.moment + factor.ridge * anchor, anchor if problem.own_output else None)


def solved(problem: LeastSquares, dense: Tensor, damping: float, where: str, solve: Callable[[Damped], R]) -> R:
    """Return what `solve` makes of the damped problem; while it fails, the ridge is made tenfold, with a warning.

    A Hessian that is close to singular may pass the first factorisation, while those of its parts, or of its inputs in
    another order, fail.

    Args:
        problem: The sums over all calibration tokens.
        dense: (d_in, d_out), the dense weight transposed.
        damping: The ridge, as a fraction of the mean diagonal of H.
        where: The name of the unit, for messages.
        solve: Makes something of the damped problem, and raises torch.linalg.LinAlgError where a step of it fails. It
            is then called again, with more damping.

    Raises:
        InputError: The largest damping is not enough, or activations are not finite.
    """
    attempt = 0
    while True:
        one = damped(problem, dense, damping, where, attempt)
        try:
            return solve(one)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            attempt = one.factor.attempt + 1
