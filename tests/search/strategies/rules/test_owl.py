"""OWL: its formulas against the plainest computation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from search.strategies.rules.owl import Owl, outlier_share, owl_sparsities
from tests.search.rules import ModelOf, dense_of, problem_of, random, run, space_of_kind


class TestOwl:
    def test_shares_are_of_all_layers_together(self) -> None:
        layers = [(random(7, 5) ** 3, random(5, seed=1).abs()), (random(3, 4, seed=2), 10 * random(4, seed=3).abs())]
        everything = torch.cat([(W.abs() * norms).flatten() for W, norms in layers])
        expected = float((everything > 2 * everything.mean()).double().mean())
        assert 0 < outlier_share(layers, 2.0) == pytest.approx(expected)

    def test_many_rows(self) -> None:
        W, norms = random(3000, 2) ** 3, torch.ones(2)
        assert outlier_share([(W, norms)], 5.0) == float((W.abs() > 5 * W.abs().mean()).double().mean())

    def test_keep_ratios(self) -> None:
        shares, sizes = np.array([3.0, 1.0, 5.0]), np.array([10.0, 10.0, 10.0])
        found = owl_sparsities(shares, sizes, 0.7, 0.08)
        assert found == pytest.approx([0.7, 0.78, 0.62])
        assert np.average(
            owl_sparsities(shares, np.array([1.0, 5.0, 2.0]), 0.7, 0.08), weights=[1, 5, 2]
        ) == pytest.approx(0.7)
        assert owl_sparsities(np.ones(3), sizes, 0.7, 0.08) == pytest.approx([0.7] * 3)
        assert owl_sparsities(shares, sizes, 0.05, 0.5).min() == 0.0

    def test_the_block_with_outliers_keeps_most(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[1].self_attn.q_proj.weight[::7, ::5] *= 40.0
        problem = problem_of(space_of_kind(model, "weights"), 0.5, dense_of(model, ids))
        state, _ = run(Owl(spread=0.4), problem)
        kept = [
            sum(
                level
                for unit, level in zip(problem.space.units, state.parent, strict=True)
                if f"layers.{b}." in unit.name
            )
            for b in range(3)
        ]
        assert kept[1] < min(kept[0], kept[2])
