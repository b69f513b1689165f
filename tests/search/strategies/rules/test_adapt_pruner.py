"""Adapt-Pruner: its steps, with similarities given, and measured on a supernet's candidates."""

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel

from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.evaluation.fitness import KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.strategies.base import Problem
from search.strategies.rules.adapt_pruner import AdaptPruner, importances, nearest, stepped
from supernet.errors import InputError
from supernet.store import Supernet
from tests.search.rules import dense_of, problem_of, run, space_of_kind
from tests.search.synthetic import SpaceOf


class TestAdaptPruner:
    def test_importances(self) -> None:
        cosines = np.array([0.9, 0.5, 0.7, 0.95])
        centred = -cosines + cosines.mean()
        assert importances(cosines) == pytest.approx(centred / np.abs(centred).max())
        assert importances(np.ones(3)).tolist() == [0.0] * 3

    def test_steps(self) -> None:
        cosines, sizes = np.array([0.9, 0.5, 0.7, 0.95]), np.ones(4)
        expected = [0.0] * 4
        for _ in range(50):
            expected = [
                min(0.99, max(0.0, s + 0.01 - 0.02 * i)) for s, i in zip(expected, importances(cosines), strict=True)
            ]
            if sum(expected) >= 4 * 0.5 - 1e-9:
                break
        found = stepped(lambda _: cosines, sizes, 0.5, 50, 0.02)
        assert found == pytest.approx(expected)
        assert found[3] > found[0] > found[2] > found[1]

    def test_measured_again(self) -> None:
        seen: list[np.ndarray] = []

        def cosines(sparsities: np.ndarray) -> np.ndarray:
            seen.append(sparsities.copy())
            return 1.0 - 0.1 * np.array([1.0, 2.0]) - sparsities  # what is pruned matters more

        found = stepped(cosines, np.ones(2), 0.4, 50, 0.02)
        assert 40 < len(seen) <= 50
        assert found.mean() == pytest.approx(0.4, abs=0.02)
        assert found[0] - found[1] == pytest.approx(0.1, abs=0.05)  # where both matter alike

    def test_the_nearest_levels(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of((10, (4, 2, 0)), (10, (8, 6))), 0.1)
        assert nearest(problem, [0.24, 0.9]) == (0, 1)
        assert nearest(problem, [0.25, 0.125]) == (0, 0)
        assert nearest(problem, [0.8, 0.2]) == (2, 1)

    def test_candidates_are_measured(
        self, family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor
    ) -> None:
        space = family_supernet.space
        budget = Budget.from_sparsity(0.4, space)
        evaluator = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
        problem = Problem(
            space, budget, uniform(space, budget), evaluator, dense_of(family_model, ids), supernet=family_supernet
        )
        rule = AdaptPruner(sequences=2)
        state, rows = run(rule, problem)
        assert problem.allows(state.parent)
        assert state.tokens > 2 * 12 and state.tokens % (2 * 12) == 0
        assert rows == []
        assert run(rule, problem)[0].parent == state.parent
        evaluator.close()

    def test_without_a_supernet_it_says_so(self, llama: PreTrainedModel, ids: Tensor) -> None:
        with pytest.raises(InputError, match="remeasure=false"):
            run(AdaptPruner(), problem_of(space_of_kind(llama, "blocks"), 0.4, dense_of(llama, ids)))
