"""The regression of Bonsai (Dery et al., 2024): from the losses of sub-models to what each member is worth.

It is a ridge regression towards a prior, whose strength is chosen by how well it ranks losses. Both the pruner and
strategies use it, so it imports nothing of the project.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The strengths of the ridge that are tried, relative to the mean squared norm of a row; infinite is the prior alone.
STRENGTHS = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
FOLDS = 5  # parts of the cross-validation that chooses among the strengths


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Return Kendall's tau-a of a and b, (n,) each: concordant less discordant pairs, divided by all pairs."""
    n = len(a)
    concordance = torch.sign(a.unsqueeze(0) - a.unsqueeze(1)) * torch.sign(b.unsqueeze(0) - b.unsqueeze(1))
    return float(concordance.sum()) / max(1, n * (n - 1))


def ridge(signs: Tensor, differences: Tensor, prior: Tensor, strength: float) -> Tensor:
    """Return coefficients that explain the differences, shrunk towards the prior, which is first scaled to fit best.

    With b = r a they minimise ||S b - y||^2 + strength s ||a - c||^2, where c >= 0 is the least-squares scale of the
    prior r, and s the mean squared norm of the rows of S diag(r). So a coefficient may leave the prior in proportion to
    the prior, which suits members of unlike size: a head weighs as much as hundreds of neurons. The problem is solved
    in its dual form, as there are many more members than pairs.

    Args:
        signs: S, (pairs, members).
        differences: y, (pairs,).
        prior: r, (members,).
        strength: How strongly coefficients are held at the prior; infinite for the prior alone.

    Returns:
        b, (members,) float64.
    """
    weighted = signs * prior
    expected = weighted.sum(1)
    scale = (expected @ differences / (expected @ expected).clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0.0)
    gram = weighted @ weighted.T
    mean = float(gram.diagonal().mean())
    if math.isinf(strength) or not mean:
        return scale * prior
    gram.diagonal().add_(strength * mean)
    rest = (differences - scale * expected).unsqueeze(1)
    correction = weighted.T @ torch.cholesky_solve(rest, torch.linalg.cholesky(gram))
    return prior * (scale + correction.squeeze(1))


def strength_of(signs: Tensor, differences: Tensor, prior: Tensor) -> float:
    """Choose the strength with which the ridge best ranks pairs that it has not seen; of equal ones the strongest.

    The measure is Kendall's tau. Both sub-models of a pair stay in one fold, as either gives the other away: what is
    ranked are the differences together with their negatives. The arguments are those of `ridge`.
    """
    folds = torch.arange(len(signs)) % min(FOLDS, len(signs))
    truth = torch.cat([differences, -differences])
    taus = []
    for strength in STRENGTHS:
        predicted = torch.zeros_like(differences)
        for fold in folds.unique():
            seen = folds != fold
            predicted[~seen] = signs[~seen] @ ridge(signs[seen], differences[seen], prior, strength)
        taus.append(kendall_tau(torch.cat([predicted, -predicted]), truth))
    return STRENGTHS[taus.index(max(taus))]
