"""What allocation rules share: the nearest allocation that is allowed, units in the model, and one pass over
the text.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.budgets.budget import Budget, Limit
from search.strategies.base import Problem
from search.strategies.rules.base import allowed, input_moments, sites, towards
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.space import Allocation, Level, Space, Unit
from tests.search.rules import Smooth, dense_of, problem_of, space_of_kind, within_reach
from tests.search.synthetic import SpaceOf


class TestTowards:
    @pytest.mark.parametrize("seed", range(20))
    def test_the_nearest_that_is_allowed(self, seed: int, random_space: SpaceOf) -> None:
        space = random_space(seed, units=4, levels=4)
        problem = problem_of(space, within_reach(space, 0.6))
        wish = np.random.default_rng(seed).uniform(0, 1, len(space.units))

        def distance(allocation: Allocation) -> float:
            kept = [unit.levels[v].cost / unit.levels[0].cost for unit, v in zip(space.units, allocation, strict=True)]
            sizes = np.array([unit.levels[0].cost for unit in space.units])
            return float((sizes * (np.array(kept) - (1 - wish)) ** 2).sum() / sizes.sum())

        everything = itertools.product(*(range(len(unit.levels)) for unit in space.units))
        best = min(distance(a) for a in everything if problem.budget.met(a) or problem.allows(a))
        found = towards(problem, wish)
        assert problem.allows(found)
        if problem.budget.met(found):
            assert distance(found) <= best + 1e-5

    @pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.25, 0.3, 0.5, 0.55, 0.75, 0.8, 0.9])
    def test_alike_wishes_are_as_even_as_uniform(self, llama: PreTrainedModel, sparsity: float) -> None:
        problem = problem_of(space_of_kind(llama, "KV groups"), sparsity)
        units = problem.space.units

        def uneven(allocation: Allocation) -> float:
            return sum(
                u.levels[0].cost * (u.sparsity(v) - sparsity) ** 2 for u, v in zip(units, allocation, strict=True)
            )

        found = towards(problem, [sparsity] * len(units))
        assert problem.budget.met(found)
        assert uneven(found) <= uneven(problem.start) + 1e-9

    def test_a_sparser_wish_is_not_a_denser_level(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (8, 6, 4, 2, 0))] * 6), 0.4)
        wish = np.array([0.1, 0.3, 0.35, 0.45, 0.5, 0.7])
        assert list(towards(problem, wish)) == sorted(towards(problem, wish))

    @pytest.mark.parametrize("seed", range(25))
    def test_two_limits_whose_steps_are_tiny(self, seed: int, random_space: SpaceOf) -> None:
        space = random_space(seed, units=6, levels=5)
        rng = np.random.default_rng(seed)
        first = Budget.from_sparsity(within_reach(space, 0.6), space).first
        times = tuple(tuple(int(c * 1000 + (c > 0) * rng.integers(1, 400)) for c in row) for row in first.costs)
        times = tuple(tuple(sorted(row, reverse=True)) for row in times)
        dense = sum(row[0] for row in times)
        budget = Budget((first, Limit("latency", int((1 - within_reach(space, 0.5)) * dense), dense, times)))
        assert all(limit.lowest <= limit.target for limit in budget.limits)
        everything = [
            a for a in itertools.product(*(range(len(unit.levels)) for unit in space.units)) if budget.fits(a)
        ]
        start = min(everything, key=budget.left)  # so near that the knapsack hardly comes as near
        problem = Problem(space, budget, start, Smooth(space))
        assert problem.allows(towards(problem, rng.uniform(0, 1, len(space.units))))
        assert problem.allows(allowed([np.arange(len(unit.levels)) * 1.0 for unit in space.units], problem))

    @pytest.mark.parametrize("seed", range(10))
    def test_where_the_knapsack_fails_the_start_is_improved(
        self, seed: int, random_space: SpaceOf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        space = random_space(seed, units=5, levels=5)
        problem = problem_of(space, within_reach(space, 0.5))
        rng = np.random.default_rng(seed)
        losses = [rng.uniform(0, 1, len(unit.levels)) for unit in space.units]
        sparsest = tuple(len(unit.levels) - 1 for unit in space.units)
        monkeypatch.setattr("search.strategies.rules.base.knapsack", lambda *_: sparsest)

        def total(allocation: Allocation) -> float:
            return float(sum(loss[level] for loss, level in zip(losses, allocation, strict=True)))

        found = allowed(losses, problem)
        assert problem.allows(found)
        assert not problem.allows(sparsest)
        assert total(found) <= total(problem.start)
        for other in itertools.product(*(range(len(unit.levels)) for unit in space.units)):
            if problem.allows(other) and sum(a != b for a, b in zip(other, found, strict=True)) <= 2:
                assert total(other) >= total(found) - 1e-9

    def test_a_wish_that_is_not_finite(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of((10, (4, 2)), (10, (4, 2))), 0.2)
        with pytest.raises(InputError, match="finite"):
            towards(problem, [math.nan, 0.2])


def test_a_unit_of_another_model_is_told(llama: PreTrainedModel) -> None:
    units = (
        Unit("model.layers.0.mlp", "mlp", 4, (Level(4, 4), Level(2, 2))),
        Unit("nowhere", "mlp", 4, (Level(4, 4), Level(2, 2))),
    )
    with pytest.raises(InputError, match="nowhere is no part"):
        sites(llama, Space(units))


def test_moments_of_all_inputs_in_one_pass(any_model: PreTrainedModel, ids: Tensor) -> None:
    found, tokens = input_moments(dense_of(any_model, ids, batch=3))
    assert tokens == ids.numel()
    seen: dict[str, list[Tensor]] = {}
    names = [
        (f"{part.name}.{layer}", part.module.get_submodule(layer))
        for part in sub_blocks(any_model)
        for s in part.stages
        for layer in s
    ]
    handles = [
        m.register_forward_hook(lambda _, x, __, n=n: seen.setdefault(n, []).append(x[0].flatten(0, -2)))
        for n, m in names
    ]
    with torch.no_grad():
        any_model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert set(found) == {name for name, _ in names}
    for name, _ in names:
        X = torch.cat(seen[name]).double()
        torch.testing.assert_close(found[name].squares, X.square().sum(0), rtol=1e-4, atol=1e-6)
