"""Bonsai (Dery et al. 2024, "Everybody Prune Now") as an allocator: finds by measuring what each unit is worth.

Sub-models around the start are measured in pairs. Within a pair, many units at once are sparser in one sub-model and
denser in the other. The differences in loss are regressed on the differences in cost by ridge regression; its prior is
that all parameters are worth the same, and its strength is chosen by Kendall's tau on pairs that were left out
(`local_prune.regression`). The allocation is the knapsack's optimum of the losses predicted by that. Each generation
measures a portion of the pairs, so that a killed run can be resumed in between.

Unlike in the paper, which removes 5 % of all members a round, the units of the space change their levels, and a linear
prediction is trusted no further than sub-models were measured: `reach` levels from the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from local_prune.regression import ridge, strength_of
from search.budgets.budget import Costs
from search.strategies.base import HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_whole
from search.strategies.measuring import Measured, Pair, sequences_for
from search.strategies.rules.base import allowed, only_allocation
from search.strategies.state import State, read_count, rng_state
from supernet.errors import InputError
from supernet.space import Allocation

PORTION = 10  # how many pairs a generation measures
FEWEST_PAIRS = 2  # how many pairs a regression needs


def pair_around(
    start: Sequence[int], most: np.ndarray, reach: int, rng: np.random.Generator
) -> tuple[Allocation, Allocation]:
    """Draw two allocations that mirror each other about the start, each unit at most `reach` levels away from it.

    Args:
        start: The level of each unit at the start.
        most: (units,) the last level of each unit, at which both are cut off.
        reach: How many levels a unit may go.
        rng: The random generator to draw from.
    """
    steps = rng.integers(-reach, reach + 1, size=len(most))
    first, second = (np.clip(np.array(start) + sign * steps, 0, most) for sign in (1, -1))
    return tuple(map(int, first)), tuple(map(int, second))


def worths(removed: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """Regress how much the loss grows per share of the model that is removed from each unit, (units,) float64.

    Args:
        removed: (pairs, units) how much more of each unit the first sub-model of a pair lacks than the second, as a
            share of the model's cost.
        differences: (pairs,) by how much the loss of the first sub-model is higher.
    """
    signs, losses = torch.from_numpy(removed), torch.from_numpy(differences)
    prior = torch.ones(removed.shape[1], dtype=torch.float64)
    found: np.ndarray = ridge(signs, losses, prior, strength_of(signs, losses, prior)).numpy()
    return found


def predicted(worth: np.ndarray, costs: Costs, dense: int, start: Sequence[int], reach: int) -> list[np.ndarray]:
    """Predict the loss of each level, (levels,) for each unit.

    A level out of reach gets a penalty that is larger than all predicted losses together.

    Args:
        worth: (units,) how much the loss grows per cost removed, where costs are fractions of `dense`.
        costs: The cost of each level of each unit.
        dense: The cost of all units together when they are dense.
        start: The level of each unit at the start.
        reach: How many levels from the start a prediction is trusted.
    """
    losses = [w * (row[0] - np.array(row)) / dense for w, row in zip(worth, costs, strict=True)]
    penalty = 1.0 + 10.0 * sum(float(np.abs(loss).max()) for loss in losses)
    away = [np.abs(np.arange(len(row)) - level) for row, level in zip(costs, start, strict=True)]
    return [loss + penalty * np.maximum(0, levels - reach) for loss, levels in zip(losses, away, strict=True)]


@dataclass(frozen=True)
class PairsState(State):
    """The sub-models measured so far.

    Attributes:
        drawn: How many pairs have been measured.
        pairs: The pairs with finite losses among them; empty again once the allocation is found.
    """

    drawn: int = 0
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields that hold the pairs."""
        pairs = tuple(map(Pair.from_json, content["pairs"]))
        return super().values_of(content) | {"drawn": read_count(content["drawn"]), "pairs": pairs}

    def allocations(self) -> list[Allocation]:
        """Add the allocations of the pairs."""
        return [self.parent, *(one for pair in self.pairs for one in (pair.first, pair.second))]


@dataclass(frozen=True)
class Bonsai(StrategyDefaults):
    """The rule that perturbs the start, measures pairs of sub-models, regresses, and solves a knapsack.

    Attributes:
        samples: How many sub-models are measured, two for each pair.
        tokens: How many tokens of the search text each pair is measured on; every pair draws its own.
        reach: How many levels a unit may go from the start, in the sub-models and in the result.
    """

    name: ClassVar[str] = "bonsai"
    state_class: ClassVar[type[State]] = PairsState
    is_rule: ClassVar[bool] = True

    samples: int = 200
    tokens: int = 2048
    reach: int = 2

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, 4, "200")
        check_whole("tokens", self.tokens, 1, "2048")
        check_whole("reach", self.reach, 1, "2")
        if self.samples % 2:
            raise InputError(
                f"strategy.samples={self.samples} must be even: sub-models come in pairs; 200 is the usual choice"
            )

    @property
    def tokens_per_generation(self) -> int:
        """Count the pairs that a generation measures."""
        return self.samples * self.tokens // self.generations

    @property
    def generations(self) -> int:
        """How many portions the pairs are measured in."""
        return -(-self.samples // (2 * PORTION))

    def begin(self, problem: Problem, seed: int) -> PairsState:
        """Return a state without any pairs."""
        return PairsState.first(problem.start, seed)

    def advance(self, problem: Problem, state: PairsState) -> tuple[PairsState, list[HistoryRow]]:
        """Measure a portion of the pairs; after the last portion, regress and solve for the allocation."""
        only = only_allocation(problem)
        if only is not None:
            return replace(state, parent=only, exhausted=True), []
        rng, measured = state.generator(), Measured(problem, state.generation)
        portion = min(PORTION, self.samples // 2 - state.drawn)
        found = [self._pair(problem, state.parent, measured, rng) for _ in range(portion)]
        pairs = (*state.pairs, *(pair for pair in found if math.isfinite(pair.difference)))
        over = state.drawn + portion == self.samples // 2
        state = replace(
            state,
            parent=self._best(problem, state.parent, pairs) if over else state.parent,
            generation=state.generation + 1,
            tokens=state.tokens + measured.tokens,
            rng=rng_state(rng),
            drawn=state.drawn + portion,
            pairs=() if over else pairs,
        )
        return state, measured.rows

    def _pair(self, problem: Problem, start: Allocation, measured: Measured, rng: np.random.Generator) -> Pair:
        """Draw and measure a pair of sub-models; its difference is NaN if either loss is not finite."""
        begun, count = time.perf_counter(), sequences_for(self.tokens, problem)
        most = np.array([len(unit.levels) - 1 for unit in problem.space.units])
        pair = pair_around(start, most, self.reach, rng)
        chosen = rng.permutation(problem.evaluate.sequences)[:count]
        fitness = measured.losses(pair, chosen).mean(1)
        measured.note(pair, fitness, count, set(), time.perf_counter() - begun)
        return Pair(*pair, float(fitness[0] - fitness[1]) if np.isfinite(fitness).all() else math.nan, count)

    def _best(self, problem: Problem, start: Allocation, pairs: Sequence[Pair]) -> Allocation:
        """Return the allocation with the least loss that the pairs predict."""
        limit = problem.budget.leading
        if len(pairs) < FEWEST_PAIRS:
            raise InputError(
                "the losses of nearly all sub-models are not finite; check the model's weights, or use dtype=float32"
            )
        # (pairs, 2, units)
        costs = np.array([[limit.table[range(len(one)), one] for one in (pair.first, pair.second)] for pair in pairs])
        removed, differences = (costs[:, 1] - costs[:, 0]) / limit.dense, np.array([pair.difference for pair in pairs])
        losses = predicted(worths(removed, differences), limit.costs, limit.dense, start, self.reach)
        return allowed(losses, problem)
