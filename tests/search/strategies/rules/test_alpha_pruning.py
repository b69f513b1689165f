"""AlphaPruning: its formulas against the plainest computation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from search.strategies.rules.alpha_pruning import AlphaPruning, alpha_sparsities, hill, spectrum
from supernet.errors import InputError
from tests.search.rules import ModelOf, dense_of, problem_of, random, run, space_of_kind


class TestAlphaPruning:
    @pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
    def test_the_spectrum(self, shape: tuple[int, int]) -> None:
        W = random(*shape)
        expected = torch.linalg.svdvals(W).square().sort().values
        torch.testing.assert_close(torch.from_numpy(spectrum(W)), expected)

    def test_zeros_are_left_out(self) -> None:
        W = random(8, 3) @ random(3, 8, seed=1)
        assert len(spectrum(W)) == 3

    def test_half(self) -> None:
        values = np.sort(np.random.default_rng(0).lognormal(size=41))
        tail = values[20:]
        assert hill(values, "half") == pytest.approx(1 + len(tail) / np.log(tail / tail[0]).sum())

    @pytest.mark.parametrize("seed", range(5))
    def test_peak(self, seed: int) -> None:
        values = np.sort(np.random.default_rng(seed).lognormal(mean=1.0, size=60))
        counts, edges = np.histogram(np.log10(values), 100)
        peak = 10 ** edges[counts.argmax()]
        best = (np.inf, 0.0)
        for x_min in values[:-1]:
            if math.log10(0.95 * peak) <= x_min <= 1.5 * peak:
                tail = values[values >= x_min]
                alpha = 1 + len(tail) / np.log(tail / x_min).sum()
                model = 1 - (tail / x_min) ** (1 - alpha)
                best = min(best, (float(np.abs(model - np.arange(len(tail)) / len(tail)).max()), alpha))
        assert hill(values) == pytest.approx(best[1])

    @pytest.mark.parametrize("tail", ["peak", "half"])
    def test_a_power_law_is_recognised(self, tail: str) -> None:
        values = np.sort(np.random.default_rng(0).pareto(1.5, size=4000) + 1)  # density x^-2.5
        assert hill(values, tail) == pytest.approx(2.5, abs=0.1)

    def test_the_mapping(self) -> None:
        alphas, sizes = np.array([2.0, 4.0, 3.0]), np.array([1.0, 2.0, 1.0])
        ratios = np.array([0.7, 1.3, 1.0])
        found = alpha_sparsities(alphas, sizes, 0.5, 0.3)
        assert found == pytest.approx(ratios * 0.5 * sizes.sum() / (sizes @ ratios))
        assert alpha_sparsities(np.ones(3), sizes, 0.5, 0.3) == pytest.approx([0.5] * 3)

    def test_nothing_goes_above_one(self) -> None:
        alphas, sizes = np.array([2.0, 4.0, 3.0]), np.array([1.0, 2.0, 1.0])
        found = alpha_sparsities(alphas, sizes, 0.9, 0.3)
        assert found[1] == 1.0 and found.max() == 1.0
        assert sizes @ found == pytest.approx(0.9 * sizes.sum())
        assert found[2] > found[0]

    def test_a_weight_of_zeros_is_told(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[0].mlp.up_proj.weight.zero_()
        with pytest.raises(InputError, match="up_proj: the spectrum"):
            run(AlphaPruning(), problem_of(space_of_kind(model, "weights"), 0.5, dense_of(model, ids)))
