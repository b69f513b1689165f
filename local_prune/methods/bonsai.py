"""Bonsai (Dery et al. 2024, "Everybody Prune Now"): what each member is worth, from forward passes alone.

Sub-models lack some of the members of every sub-block. They are run in pairs that lack opposite members, and the
difference of their losses is regressed on what they lack: the coefficients say what each member is worth. A prior from
the activations says which members are beyond doubt, which ones are dropped together, and what the coefficients shrink
to.

This differs from the paper, which removes 5 % of the parameters a round, sorted globally, and surveys again what is
left. Here one survey of the dense model gives an order of the members of every unit, and the search decides how much of
each unit stays. Only differences within pairs are regressed, so that each pair may have text of its own and no
intercept is needed; the regression is a ridge in closed form instead of L1 and Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.shared.members import SurveyedPruner
from local_prune.methods.wanda_sp import wanda_sp
from local_prune.pruner import Calibration, Track
from local_prune.regression import ridge, strength_of
from local_prune.statistics import Moments, finite
from local_prune.text.passes import TextWalk, next_token_loss
from supernet.candidates import member_columns
from supernet.errors import InputError
from supernet.models.architecture import SubBlock

# The most sub-models: their losses, and what each of them lacks, are in memory at once.
MOST_SAMPLES = 1_000_000

# The loss on sequences (n, tokens) of the sub-model that lacks members (k,) of sub-blocks, which are given by name.
Loss = Callable[[Tensor, Mapping[str, Tensor]], float]


@dataclass(frozen=True)
class Pool:
    """The members of a sub-block that sub-models may lack.

    Attributes:
        members: The members with the lowest prior, (2 * drop,) int64.
        drop: How many of them each sub-model of a pair lacks.
        chance: How probable it is that a pair touches the sub-block at all. It is below 1 where members are so few that
            dropping one is more than the fraction asked for.
    """

    members: Tensor
    drop: int
    chance: float


def pool_of(prior: Tensor, fraction: float) -> Pool:
    """The pool of a sub-block with this prior (members,), of which sub-models lack `fraction` on average."""
    expected = fraction * len(prior)
    drop = min(max(1, round(expected)), len(prior) // 2)
    return Pool(prior.argsort(stable=True)[: 2 * drop], drop, min(1.0, expected / drop) if drop else 0.0)


def sample(pool: Pool, prior: Tensor, generator: torch.Generator) -> Tensor:
    """Draw which of a pool's members the first sub-model of a pair lacks; the second one lacks the others.

    The draw is without replacement, with weights max(prior) - prior, so that members of low worth go together.

    Args:
        pool: Pool of the sub-block.
        prior: Prior of all its members, (members,).
        generator: A generator on the CPU.

    Returns:
        (2 * drop,) float64: -1 where the first lacks the member, 1 where the second does; 0 if the pair lacks none.
    """
    signs = torch.zeros(len(pool.members), dtype=torch.float64)
    if float(torch.rand((), generator=generator)) >= pool.chance:
        return signs
    weights = (prior.max() - prior[pool.members]).double()
    weights += 1e-6 * weights.mean() + torch.finfo(torch.float64).tiny  # equal ones may go, too
    first = torch.multinomial(weights, pool.drop, generator=generator)
    return signs.add_(1.0).index_fill_(0, first, -1.0)


def order_scores(prior: Tensor, pool: Pool, coefficients: Tensor) -> Tensor:
    """Rank the members of the pool by their coefficients, and above them all others by the prior.

    Equal coefficients are ranked by the prior, too.

    Args:
        prior: Prior of all members, (members,).
        pool: Pool of the sub-block.
        coefficients: Coefficients of the pool's members, (2 * drop,).

    Returns:
        (members,) float32: 0 for the first to go, and so on.
    """
    ranking = prior.argsort(stable=True)  # begins with the pool
    ranking[: len(pool.members)] = pool.members[coefficients.argsort(stable=True)]
    scores = torch.empty(len(prior))
    scores[ranking] = torch.arange(len(prior), dtype=torch.float32)
    return scores


@torch.no_grad()
def priors(
    model: PreTrainedModel, parts: Sequence[SubBlock], calibration: Calibration, device: torch.device, track: Track
) -> dict[str, Tensor]:
    """`wanda_sp` of the dense model: of each of the sub-blocks with members their shares, (members,) float64 on the
    CPU.
    """
    moments: dict[str, Moments] = {}
    walk = TextWalk(model, device)
    for ids in track(calibration.ids.split(calibration.batch), "activations"):
        for step in walk.steps(ids, record=True):
            if step.part.groups is not None:
                X = step.inputs[step.part.column]
                moments.setdefault(step.part.name, Moments.zeros(X.shape[1], device)).add(X)
    found = {}
    for part in parts:
        if part.groups is not None:
            dense = part.weight(part.column)
            scores = wanda_sp(dense, moments[part.name].norms.to(dense.device), part.groups.width)
            scores = finite(scores, part.name).double().cpu()
            found[part.name] = scores / scores.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return found


@torch.no_grad()
def loss_without(
    model: PreTrainedModel, ids: Tensor, columns: Mapping[str, Tensor], device: torch.device, unscored: int = 0
) -> float:
    """Mean next-token loss of a sub-model.

    Args:
        model: The dense model.
        ids: (batch, tokens).
        columns: Sub-block -> input columns of its last layer that are zero, (k,).
        device: Where the block at work lies.
        unscored: First positions of each sequence that the loss leaves out; see `Calibration`.
    """

    def without(part: SubBlock) -> Mapping[str, Tensor]:
        if part.name not in columns:
            return {}
        weight = part.weight(part.column).index_fill(1, columns[part.name].to(device), 0.0)
        return part.replaced(part.column, weight)

    for step in TextWalk(model, device).steps(ids, without):
        hidden = step.behind
    return next_token_loss(model, hidden, ids, unscored)


@dataclass(frozen=True)
class BonsaiPruner(SurveyedPruner):
    """Members that sub-models miss least go first: `prune=bonsai`.

    Attributes:
        samples: How many sub-models are run, two a pair.
        sequences: How many sequences of the calibration text a pair is run on.
        drop: Fraction of the members that a sub-model lacks on average; the pool has twice as many, of lowest prior.
        seed: Seed of all draws.
    """

    name: ClassVar[str] = "bonsai"
    version: ClassVar[int] = 1

    samples: int = 64
    sequences: int = 4
    drop: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.samples <= MOST_SAMPLES or self.samples % 2:
            raise InputError(
                f"prune.pruner.samples={self.samples} must be an even number of sub-models from 4 to {MOST_SAMPLES:,}; "
                "64 is a fair start"
            )
        if self.sequences < 1:
            raise InputError(
                f"prune.pruner.sequences={self.sequences} must be at least 1 calibration sequence; 4 is a fair start"
            )
        if not 0 < self.drop <= 0.5:
            raise InputError(
                f"prune.pruner.drop={self.drop} must be above 0 and at most 0.5 of the members; 0.1 is a fair start"
            )

    def survey(
        self, model: PreTrainedModel, calibration: Calibration, device: torch.device, track: Track
    ) -> Mapping[str, Tensor]:
        """The rank of each member in its sub-block: prior, sub-models, regression."""
        parts = self.parts(model)
        prior = priors(model, parts, calibration, device, track)
        pools = {name: pool_of(shares, self.drop) for name, shares in prior.items()}
        if not pools:
            return {}
        widths = {part.name: part.groups.width for part in parts if part.groups is not None}

        def loss(ids: Tensor, lacking: Mapping[str, Tensor]) -> float:
            columns = {name: member_columns(members, widths[name]) for name, members in lacking.items()}
            batches = ids.split(calibration.batch)
            return sum(loss_without(model, b, columns, device, calibration.unscored) * len(b) for b in batches) / len(
                ids
            )

        signs, differences = self._pairs(calibration, prior, pools, loss, track)
        expected = torch.cat([prior[name][pool.members] for name, pool in pools.items()])
        coefficients = ridge(signs, differences, expected, strength_of(signs, differences, expected))
        split = coefficients.split([len(pool.members) for pool in pools.values()])
        return {name: order_scores(prior[name], pools[name], part) for name, part in zip(pools, split, strict=True)}

    def survey_tokens(self, calibration: Calibration) -> int:
        """A pass for the prior, and those of the sub-models."""
        sequences, tokens = calibration.ids.shape
        return (sequences + self.samples * min(self.sequences, sequences)) * tokens

    def _pairs(
        self, calibration: Calibration, prior: Mapping[str, Tensor], pools: Mapping[str, Pool], loss: Loss, track: Track
    ) -> tuple[Tensor, Tensor]:
        """Run all pairs.

        Returns:
            What the sub-models of each pair lack, (pairs, members in pools), as `sample` gives it, and by how much the
            loss of the first one is lower, (pairs,).
        """
        generator = torch.Generator().manual_seed(self.seed)
        rows: list[Tensor] = []
        differences: list[float] = []
        for _ in track(range(self.samples // 2), "sub-models"):
            ids = calibration.ids[torch.randperm(len(calibration.ids), generator=generator)[: self.sequences]]
            signs = {name: sample(pool, prior[name], generator) for name, pool in pools.items()}
            first, second = (
                loss(
                    ids,
                    {name: pools[name].members[sign == lacking] for name, sign in signs.items() if bool(sign.any())},
                )
                for lacking in (-1.0, 1.0)
            )
            if not math.isfinite(second - first):
                raise InputError(
                    "the loss of a sub-model is not finite; check the model's weights, or use dtype=float32"
                )
            rows.append(torch.cat(list(signs.values())))
            differences.append(second - first)
        return torch.stack(rows), torch.tensor(differences, dtype=torch.float64)
