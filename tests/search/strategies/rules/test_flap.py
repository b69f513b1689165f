"""FLAP: its formulas against the plainest computation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from search.strategies.rules.flap import Flap, column_metric, rank_members, rank_weights, sparsities_of, weight_scores
from tests.search.rules import ModelOf, dense_of, moments_of, problem_of, random, run, space_of_kind


class TestFlap:
    def test_metrics(self) -> None:
        W, X = random(6, 8), random(50, 8, seed=1) * torch.arange(1, 9)
        found = column_metric(W, moments_of(X), "WIFV")
        torch.testing.assert_close(found, X.var(0, correction=0) * W.square().sum(0), rtol=1e-5, atol=0)
        found = column_metric(W, moments_of(X), "WIFN")
        torch.testing.assert_close(found, W.abs().mean(0) * X.norm(dim=0), rtol=1e-5, atol=0)

    @pytest.mark.parametrize(("width", "squared"), [(1, False), (4, True)])
    def test_members(self, width: int, squared: bool) -> None:
        metric = random(12).abs()
        values = (metric**2 if squared else metric).numpy()
        standard = (values - values.mean()) / values.std(ddof=1)
        ranked = rank_members(metric, width, squared)
        assert ranked.scores == pytest.approx(np.sort(standard.reshape(-1, width).mean(1)))
        assert ranked.counts.tolist() == [1] * (12 // width)

    @pytest.mark.parametrize("metric", ["WIFV", "WIFN"])
    def test_single_weights(self, metric: str) -> None:
        W, moments = random(1500, 20), moments_of(random(64, 20, seed=1) * torch.arange(20))
        W[3:60] = 0.0
        ranked = rank_weights(lambda: weight_scores(W, moments, metric))
        every = torch.cat(list(weight_scores(W, moments, metric))).double().flatten().sort().values.numpy()
        expected = (every - every.mean()) / every.std(ddof=1)
        assert ranked.counts.sum() == len(every)
        found = np.repeat(ranked.scores, ranked.counts.astype(int))
        assert np.abs(found - expected).max() < 5e-4 * (1 + np.abs(expected).max())
        assert (np.diff(ranked.scores) > 0).all()

    def test_weights_that_are_all_alike(self) -> None:
        ranked = rank_weights(lambda: iter([torch.full((3, 4), 0.5)]))
        assert (ranked.scores.tolist(), ranked.counts.tolist()) == ([0.0], [12.0])

    @pytest.mark.parametrize("seed", range(10))
    def test_the_global_order(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        metrics = [torch.from_numpy(rng.lognormal(size=n)) for n in (4, 9, 6)]
        ranked = [rank_members(metric, 1, False) for metric in metrics]
        sizes = np.array([400.0, 90.0, 300.0])
        target = rng.uniform(0.2, 0.9) * sizes.sum()
        members = sorted((s, i) for i, one in enumerate(ranked) for s in one.scores)
        gone, left = [0, 0, 0], sizes.sum()
        for _, unit in members:
            if left <= target:
                break
            gone[unit] += 1
            left -= sizes[unit] / len(metrics[unit])
        assert sparsities_of(ranked, sizes, target) == pytest.approx(
            [g / len(m) for g, m in zip(gone, metrics, strict=True)]
        )

    def test_a_layer_that_hardly_fluctuates_in_places_loses_them(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[2].mlp.down_proj.weight[:, :90] *= 1e-3  # the other six stand out: most are below the mean
        problem = problem_of(space_of_kind(model, "KV groups"), 0.3, dense_of(model, ids))
        state, _ = run(Flap(), problem)
        of = {unit.name: level for unit, level in zip(problem.space.units, state.parent, strict=True)}
        assert of["model.layers.2.mlp"] != of["model.layers.0.mlp"]
