"""Problems for allocation rules, and one run of a rule on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.statistics import Moments
from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.run.levels import Grid
from search.strategies.base import Dense, HistoryRow, Problem, Strategy
from search.strategies.state import State
from supernet.models.architecture import sub_blocks
from supernet.models.prunables import Pattern, bit_prunables, member_prunables, presence_prunables, weight_prunables
from supernet.space import Allocation, Space

ModelOf = Callable[..., PreTrainedModel]

KINDS: dict[str, Callable[[PreTrainedModel], Sequence[Any]]] = {
    "KV groups": lambda model: member_prunables(sub_blocks(model), 8),
    "query heads": lambda model: member_prunables(sub_blocks(model), 8, query_heads=True),
    "biases": lambda model: member_prunables(sub_blocks(model), 8, bias=True),
    "weights": lambda model: weight_prunables(sub_blocks(model), []),
    "N:M": lambda model: weight_prunables(sub_blocks(model), [Pattern(1, 4), Pattern(2, 4)]),
    "bits": lambda model: bit_prunables(sub_blocks(model), [8, 4, 2], 32),
    "sub-blocks": lambda model: presence_prunables(sub_blocks(model), whole_blocks=False),
    "blocks": lambda model: presence_prunables(sub_blocks(model), whole_blocks=True),
}


@dataclass
class Smooth:
    """Losses that grow with sparsity, at a rate of each unit's own."""

    space: Space
    sequences: int = 20
    sequence_length: int = 12
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        self.calls.append((len(allocations), len(chosen)))
        rates = np.random.default_rng(0).lognormal(size=len(self.space.units))
        costs = [
            [unit.levels[v].cost / unit.levels[0].cost for unit, v in zip(self.space.units, a, strict=True)]
            for a in allocations
        ]
        return np.array([rates @ (1 - np.array(c)) + 0.01 * chosen for c in costs])

    def effects(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
        raise NotImplementedError


def problem_of(space: Space, sparsity: float, dense: Dense | None = None) -> Problem:
    budget = Budget.from_sparsity(sparsity, space)
    return Problem(space, budget, uniform(space, budget), Smooth(space), dense)


def within_reach(space: Space, share: float) -> float:
    """A sparsity: this share of what the space can remove, or a little where it can remove nothing."""
    return max(1e-6, share * (1.0 - space.lowest_cost / space.dense_cost))


def space_of_kind(model: PreTrainedModel, kind: str) -> Space:
    return Grid(9, 0.125).first(KINDS[kind](model)).space


def dense_of(model: PreTrainedModel, ids: Tensor, batch: int = 2) -> Dense:
    return Dense(model, ids, batch, torch.device("cpu"))


def run(rule: Strategy, problem: Problem, seed: int = 0) -> tuple[State, list[HistoryRow]]:
    """To the end."""
    state, rows = rule.begin(problem, seed), list[HistoryRow]()
    for _ in range(rule.generations):
        if not state.exhausted:
            state, more = rule.advance(problem, state)
            rows += more
    return state, rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments_of(X: Tensor) -> Moments:
    moments = Moments.zeros(X.shape[1])
    moments.add(X)
    return moments
