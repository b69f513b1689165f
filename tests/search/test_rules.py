"""Allocation rules: their formulas against the plainest computation, and what all of them keep to on every kind of space."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration
from local_prune.statistics import Moments
from local_prune.unstructured import WandaPruner
from local_prune.walk import build
from search.budget import Budget, Limit
from search.evaluator import GenerationEvaluator
from search.fitness import KlDivergence
from search.knapsack import uniform
from search.levels import Grid, mixture
from search.strategies.adapt_pruner import AdaptPruner, importances, nearest, stepped
from search.strategies.alpha_pruning import AlphaPruning, alpha_sparsities, hill, spectrum
from search.strategies.base import Dense, Problem, Row, State, Strategy
from search.strategies.bonsai import Bonsai, pair_around, predicted, worths
from search.strategies.flap import Flap, column_metric, rank_members, rank_weights, sparsities_of, weight_scores
from search.strategies.owl import Owl, outlier_share, owl_sparsities
from search.strategies.rule import allowed, input_moments, sites, towards
from search.strategies.shortgpt import ShortGPT, drop_lowest, similarities
from search.strategies.uniform import Uniform
from supernet.architecture import sub_blocks
from supernet.errors import InputError
from supernet.prunables import Pattern, bit_prunables, member_prunables, presence_prunables, weight_prunables
from supernet.space import Allocation, Level, Space, Unit
from supernet.store import Supernet

SpaceOf = Callable[..., Space]
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
MEMBERS = ("KV groups", "query heads", "biases")
FITTING = {"flap": (*MEMBERS, "weights", "N:M"), "shortgpt": ("sub-blocks", "blocks")}  # the others fit all
RULES: dict[str, Strategy] = {
    "uniform": Uniform(),
    "owl": Owl(),
    "alpha_pruning": AlphaPruning(),
    "alpha_pruning by layer": AlphaPruning(by="layer", tail="half"),
    "flap": Flap(),
    "adapt_pruner": AdaptPruner(remeasure=False),
    "shortgpt": ShortGPT(),
    "bonsai": Bonsai(samples=20, tokens=24),
}
NO_MODEL = ("uniform", "bonsai")


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
            [unit.levels[v].cost / unit.levels[0].cost for unit, v in zip(self.space.units, a, strict=True)] for a in allocations
        ]
        return np.array([rates @ (1 - np.array(c)) + 0.01 * chosen for c in costs])

    def changes(self, allocation: Allocation, chosen: np.ndarray) -> list[np.ndarray]:
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


def fits(rule: str, kind: str) -> bool:
    return kind in FITTING.get(rule.split()[0], KINDS)


def run(rule: Strategy, problem: Problem, seed: int = 0) -> tuple[State, list[Row]]:
    return rule.advance(problem, rule.begin(problem, seed))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments_of(X: Tensor) -> Moments:
    moments = Moments.zeros(X.shape[1])
    moments.add(X)
    return moments


@pytest.fixture(scope="module")
def llama(model_of: ModelOf) -> PreTrainedModel:
    return model_of("llama")


class TestEveryRule:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", RULES)
    def test_the_budget_is_kept_on_every_kind_of_space(self, name: str, kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
        for sparsity in (0.2, 0.5, 0.65):
            problem = problem_of(space_of_kind(llama, kind), sparsity, dense_of(llama, ids))
            if not fits(name, kind):
                with pytest.raises(InputError, match=f"strategy={name} is for .*; use ") as error:
                    run(RULES[name], problem)
                assert "\n" not in str(error.value)
                continue
            state, rows = run(RULES[name], problem)
            assert problem.allows(state.parent)
            assert state.generation == RULES[name].generations == 1
            assert math.isnan(state.fitness) and not state.exhausted
            assert all(type(level) is int for level in state.parent)
            assert bool(rows) == (name == "bonsai")
            json.dumps(asdict(replace(state, fitness=0.0)))

    @pytest.mark.parametrize("name", RULES)
    def test_every_family(self, name: str, any_model: PreTrainedModel, ids: Tensor) -> None:
        kinds = ["weights", "blocks"] if any_model.config.model_type.startswith("mamba") else ["KV groups", "weights", "blocks"]
        for kind in kinds:
            if fits(name, kind):
                problem = problem_of(space_of_kind(any_model, kind), 0.4, dense_of(any_model, ids))
                state, _ = run(RULES[name], problem)
                assert problem.allows(state.parent)

    @pytest.mark.parametrize("name", NO_MODEL)
    @pytest.mark.parametrize("seed", range(30))
    def test_odd_spaces(self, name: str, seed: int, random_space: SpaceOf) -> None:
        space = random_space(seed, units=6, levels=5)
        problem = problem_of(space, within_reach(space, 0.6))
        state, _ = run(RULES[name], problem)
        assert problem.allows(state.parent)

    @pytest.mark.parametrize("name", RULES)
    def test_the_same_seed_gives_the_same_and_a_checkpoint_goes_on(self, name: str, llama: PreTrainedModel, ids: Tensor) -> None:
        problem = problem_of(space_of_kind(llama, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(llama, ids))
        before = RULES[name].begin(problem, 3)
        assert before.parent == problem.start and before.generation == before.tokens == 0
        content = json.loads(json.dumps(asdict(replace(before, fitness=None))))
        resumed = State(**(content | {"parent": tuple(content["parent"]), "fitness": math.nan}))
        first, second = RULES[name].advance(problem, before), RULES[name].advance(problem, resumed)
        for states in zip(*(asdict(replace(state, fitness=0.0)).items() for state, _ in (first, second)), strict=True):
            assert states[0] == states[1]
        assert [(r.allocation, r.fitness, r.step) for r in first[1]] == [(r.allocation, r.fitness, r.step) for r in second[1]]

    @pytest.mark.parametrize("name", RULES)
    def test_no_choice_ends_at_once(self, name: str, space_of: SpaceOf) -> None:
        space = space_of((10, (4, 2)), (7, (6,)))
        for target, only in ((space.lowest_cost, (1, 0)), (space.dense_cost, (0, 0))):
            budget = Budget.from_sparsity(1e-9, space)
            budget = Budget((replace(budget.first, target=target),))
            state, rows = run(RULES[name], Problem(space, budget, only, Smooth(space)))
            assert (state.parent, state.exhausted, rows, state.tokens) == (only, True, [], 0)

    @pytest.mark.parametrize("name", [name for name in RULES if name not in NO_MODEL])
    def test_without_a_model_it_says_so(self, name: str, llama: PreTrainedModel) -> None:
        kind = "sub-blocks" if name == "shortgpt" else "KV groups"
        with pytest.raises(InputError, match="dense model"):
            run(RULES[name], problem_of(space_of_kind(llama, kind), 0.5))

    @pytest.mark.parametrize("name", [name for name in RULES if name not in NO_MODEL])
    def test_weights_that_are_not_finite_are_told(self, name: str, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
        kind = "sub-blocks" if name == "shortgpt" else "KV groups"
        with pytest.raises(InputError, match="finite") as error:
            run(RULES[name], problem_of(space_of_kind(model, kind), 0.5, dense_of(model, ids)))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", [name for name in RULES if name not in NO_MODEL])
    def test_the_model_is_left_as_it_was(self, name: str, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        run(
            RULES[name],
            problem_of(space_of_kind(model, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(model, ids)),
        )
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("name", [name for name in RULES if name not in NO_MODEL])
    def test_tokens_are_counted(self, name: str, llama: PreTrainedModel, ids: Tensor) -> None:
        problem = problem_of(space_of_kind(llama, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(llama, ids))
        state, _ = run(RULES[name], problem)
        assert state.tokens == (0 if name.startswith("alpha") else ids.numel())

    @pytest.mark.parametrize("name", [name.split()[0] for name in RULES if " " not in name])
    def test_its_file_has_its_defaults(self, name: str, conf: Any) -> None:
        config = OmegaConf.load(conf / "strategy" / f"{name}.yaml")
        assert instantiate(config) == type(RULES[name])()
        settings = asdict(instantiate(config))
        assert set(settings) == set(config) - {"_target_"}

    @pytest.mark.parametrize(
        ("rule", "wrong"),
        [
            (Owl, {"outlier": -1}),
            (Owl, {"spread": 0.6}),
            (Owl, {"spread": "much"}),
            (Owl, {"outlier": math.nan}),
            (AlphaPruning, {"epsilon": 1.5}),
            (AlphaPruning, {"by": "head"}),
            (AlphaPruning, {"tail": "all"}),
            (Flap, {"metric": "IFV"}),
            (AdaptPruner, {"steps": 0}),
            (AdaptPruner, {"steps": 1.5}),
            (AdaptPruner, {"amplitude": -0.1}),
            (AdaptPruner, {"remeasure": "yes"}),
            (AdaptPruner, {"sequences": True}),
            (Bonsai, {"samples": 5}),
            (Bonsai, {"samples": 2}),
            (Bonsai, {"tokens": 0}),
            (Bonsai, {"reach": 0}),
        ],
    )
    def test_settings_out_of_range(self, rule: Any, wrong: dict[str, Any]) -> None:
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=rf"strategy\.{name}={value} ") as error:
            rule(**wrong)
        assert "\n" not in str(error.value)


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

    def test_alike_wishes_are_uniform(self, llama: PreTrainedModel) -> None:
        problem = problem_of(space_of_kind(llama, "KV groups"), 0.3)
        assert towards(problem, [0.3] * len(problem.space.units)) == problem.start

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
        if any(limit.lowest > limit.target for limit in budget.limits):
            pytest.skip("cannot be met")
        everything = [a for a in itertools.product(*(range(len(unit.levels)) for unit in space.units)) if budget.fits(a)]
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
        monkeypatch.setattr("search.strategies.rule.knapsack", lambda *_: sparsest)

        def total(allocation: Allocation) -> float:
            return float(sum(loss[level] for loss, level in zip(losses, allocation, strict=True)))

        found = allowed(losses, problem)
        assert problem.allows(found)
        if problem.allows(sparsest):
            assert found == sparsest
            return
        assert total(found) <= total(problem.start)
        for other in itertools.product(*(range(len(unit.levels)) for unit in space.units)):
            if problem.allows(other) and sum(a != b for a, b in zip(other, found, strict=True)) <= 2:
                assert total(other) >= total(found) - 1e-9

    def test_a_wish_that_is_not_finite(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of((10, (4, 2)), (10, (4, 2))), 0.2)
        with pytest.raises(InputError, match="finite"):
            towards(problem, [math.nan, 0.2])


def test_a_unit_of_another_model_is_told(llama: PreTrainedModel, ids: Tensor) -> None:
    units = (
        Unit("model.layers.0.mlp", "mlp", 4, (Level(4, 4), Level(2, 2))),
        Unit("nowhere", "mlp", 4, (Level(4, 4), Level(2, 2))),
    )
    with pytest.raises(InputError, match="nowhere is no part"):
        sites(problem_of(Space(units), 0.25, dense_of(llama, ids)))


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
        m.register_forward_hook(lambda _, x, __, n=n: seen.setdefault(n, []).append(x[0].flatten(0, -2))) for n, m in names
    ]
    with torch.no_grad():
        any_model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert set(found) == {name for name, _ in names}
    for name, _ in names:
        X = torch.cat(seen[name]).double()
        torch.testing.assert_close(found[name].squares, X.square().sum(0), rtol=1e-4, atol=1e-6)


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
        assert np.average(owl_sparsities(shares, np.array([1.0, 5.0, 2.0]), 0.7, 0.08), weights=[1, 5, 2]) == pytest.approx(0.7)
        assert owl_sparsities(np.ones(3), sizes, 0.7, 0.08) == pytest.approx([0.7] * 3)
        assert owl_sparsities(shares, sizes, 0.05, 0.5).min() == 0.0

    def test_the_block_with_outliers_keeps_most(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[1].self_attn.q_proj.weight[::7, ::5] *= 40.0
        problem = problem_of(space_of_kind(model, "weights"), 0.5, dense_of(model, ids))
        state, _ = run(Owl(spread=0.4), problem)
        kept = [
            sum(level for unit, level in zip(problem.space.units, state.parent, strict=True) if f"layers.{b}." in unit.name)
            for b in range(3)
        ]
        assert kept[1] < min(kept[0], kept[2])


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
        assert sparsities_of(ranked, sizes, target) == pytest.approx([g / len(m) for g, m in zip(gone, metrics, strict=True)])

    def test_a_layer_that_hardly_fluctuates_in_places_loses_them(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        model.model.layers[2].mlp.down_proj.weight[:, :90] *= 1e-3  # the other six stand out: most are below the mean
        problem = problem_of(space_of_kind(model, "KV groups"), 0.3, dense_of(model, ids))
        state, _ = run(Flap(), problem)
        of = {unit.name: level for unit, level in zip(problem.space.units, state.parent, strict=True)}
        assert of["model.layers.2.mlp"] != of["model.layers.0.mlp"]


class TestSimilarities:
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_of_blocks_and_sub_blocks(self, llama: PreTrainedModel, ids: Tensor, batch: int) -> None:
        found = similarities(dense_of(llama, ids, batch))
        streams: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, x, y: streams.extend((x[0], y if torch.is_tensor(y) else y[0])))
            for layer in llama.model.layers
        ]
        middles: list[Tensor] = []
        handles += [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: middles.append(x[0]))
            for layer in llama.model.layers
        ]
        with torch.no_grad():
            llama(input_ids=ids)
        for handle in handles:
            handle.remove()

        def mean(a: Tensor, b: Tensor) -> float:
            a, b = a.double(), b.double()
            return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())

        for index in range(3):
            before, middle, behind = streams[2 * index], middles[index], streams[2 * index + 1]
            assert found.blocks[index] == pytest.approx(mean(before, behind), abs=1e-5)
            assert found.parts[f"model.layers.{index}.self_attn"] == pytest.approx(mean(before, middle), abs=1e-5)
            assert found.parts[f"model.layers.{index}.mlp"] == pytest.approx(mean(middle, behind), abs=1e-5)

    def test_an_absent_sub_block_changes_nothing(self, llama: PreTrainedModel, ids: Tensor) -> None:
        found = similarities(dense_of(llama, ids), replaced=lambda part: None if part.block == 1 else {})
        assert found.blocks[1] == pytest.approx(1.0)
        assert found.blocks[0] == similarities(dense_of(llama, ids)).blocks[0]


class TestShortGPT:
    def test_the_lowest_are_dropped(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (1, 0))] * 4), 0.5)
        assert drop_lowest(np.array([0.3, 0.1, 0.4, 0.2]), problem) == (0, 1, 0, 1)

    def test_a_block_that_does_nothing_goes(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            layer.weight.mul_(1e-4)
        for kind, expected in (("blocks", (0, 1, 0)), ("sub-blocks", (0, 0, 1, 1, 0, 0))):
            state, _ = run(ShortGPT(), problem_of(space_of_kind(model, kind), 0.33, dense_of(model, ids)))
            assert state.parent == expected


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
            expected = [min(0.99, max(0.0, s + 0.01 - 0.02 * i)) for s, i in zip(expected, importances(cosines), strict=True)]
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

    def test_candidates_are_measured(self, family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor) -> None:
        space = family_supernet.space
        budget = Budget.from_sparsity(0.4, space)
        evaluator = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
        problem = Problem(space, budget, uniform(space, budget), evaluator, dense_of(family_model, ids))
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


class TestBonsai:
    def test_pairs_mirror_each_other(self) -> None:
        rng, most = np.random.default_rng(0), np.array([8, 8, 1, 0, 4])
        start = (4, 4, 0, 0, 2)
        for _ in range(20):
            first, second = pair_around(start, most, 2, rng)
            for index in (0, 1, 4):
                assert first[index] + second[index] == 2 * start[index]
            assert all(
                0 <= v <= m and abs(v - s) <= 2 for one in (first, second) for v, m, s in zip(one, most, start, strict=True)
            )
            assert (first[2] == 0 or second[2] == 0) and first[3] == second[3] == 0

    def test_a_linear_loss_is_found(self) -> None:
        rng = np.random.default_rng(0)
        removed = rng.normal(size=(200, 6)) / 60
        truth = np.array([1.0, 2.0, 0.5, 4.0, 3.0, 1.5])
        found = worths(removed, removed @ truth)
        assert found == pytest.approx(truth, rel=0.15)
        assert np.argsort(found).tolist() == np.argsort(truth).tolist()

    def test_noise_alone_leaves_the_prior(self) -> None:
        found = worths(np.zeros((4, 3)), np.zeros(4))
        assert np.isfinite(found).all()
        assert np.ptp(found) == 0.0

    def test_losses_and_reach(self) -> None:
        losses = predicted(np.array([2.0, 1.0]), ((10, 6, 2, 0), (10, 0)), 20, (1, 0), 1)
        assert losses[0][:3] == pytest.approx([0.0, 0.4, 0.8])
        assert losses[0][3] > 10 * (1.0 + 0.5)
        assert losses[1] == pytest.approx([0.0, 0.5])

    def test_it_moves_to_what_costs_little(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (8, 7, 6, 5, 4, 3, 2, 1, 0))] * 8), 0.5)
        state, rows = run(Bonsai(samples=120, tokens=60), problem)
        everything = np.arange(problem.evaluate.sequences)
        before, after = problem.evaluate([problem.start, state.parent], everything).mean(1)
        assert after < before
        assert all(abs(a - b) <= 2 for a, b in zip(state.parent, problem.start, strict=True))
        rates = np.random.default_rng(0).lognormal(size=8)
        assert [v > 4 for v in state.parent] == [rate < np.median(rates) for rate in rates]

    def test_what_is_measured_is_told(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 4), 0.5)
        rule = Bonsai(samples=10, tokens=30)
        state, rows = run(rule, problem)
        evaluator = problem.evaluate
        assert isinstance(evaluator, Smooth)
        assert state.tokens == sum(n * s for n, s in evaluator.calls) * 12
        assert len(rows) == 10 and {row.step for row in rows} == set(range(5))
        assert all(row.tokens == 36 and not row.survived for row in rows)
        assert rule.tokens_per_generation == 300

    def test_a_loss_that_is_not_finite(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (4, 3, 2, 1, 0))] * 4), 0.5)

        class Lost(Smooth):
            def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
                return np.full((len(allocations), len(chosen)), math.nan)

        with pytest.raises(InputError, match="finite"):
            run(Bonsai(samples=4), replace(problem, evaluate=Lost(problem.space)))


def test_on_a_built_supernet_of_weights(llama: PreTrainedModel, ids: Tensor, tmp_path: Any) -> None:
    pruner = WandaPruner()
    window = Grid(5, 0.25).first(pruner.prunables(sub_blocks(llama)))
    supernet = Supernet.open_or_create(tmp_path, window.space, {})
    budget = Budget.from_sparsity(0.5, window.space)
    start = uniform(window.space, budget)
    calibration = Calibration(ids, batch=2)
    build(llama, calibration, pruner, supernet, mixture(window, "none", start), torch.device("cpu"), lambda s, _: s, "test", {})
    evaluator = GenerationEvaluator(llama, supernet, ids, KlDivergence())
    problem = Problem(window.space, budget, start, evaluator, dense_of(llama, ids))
    for rule in (Uniform(), Owl(), AlphaPruning(by="layer"), Flap(), AdaptPruner(sequences=2), Bonsai(samples=8, tokens=24)):
        state, _ = run(rule, problem)
        assert problem.allows(state.parent)
    evaluator.close()
