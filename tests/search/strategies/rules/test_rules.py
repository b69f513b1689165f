"""What all allocation rules keep to, on every kind of space."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import Calibration
from local_prune.walk import build
from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.evaluation.fitness import KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.run.levels import Grid, mixture
from search.strategies.base import Problem, Strategy
from search.strategies.rules.adapt_pruner import AdaptPruner
from search.strategies.rules.alpha_pruning import AlphaPruning
from search.strategies.rules.bonsai import Bonsai
from search.strategies.rules.flap import Flap
from search.strategies.rules.owl import Owl
from search.strategies.rules.shortgpt import ShortGPT
from search.strategies.rules.uniform import Uniform
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.store import Supernet
from tests.search.rules import KINDS, ModelOf, Smooth, dense_of, problem_of, run, space_of_kind, within_reach
from tests.search.synthetic import SpaceOf, through_json

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
    "bonsai": Bonsai(samples=44, tokens=24),
}
NO_MODEL = ("uniform", "bonsai")


def fits(rule: str, kind: str) -> bool:
    return kind in FITTING.get(rule.split()[0], KINDS)


class TestEveryRule:
    @pytest.mark.sampled
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", RULES)
    def test_the_budget_is_kept_on_every_kind_of_space(
        self, name: str, kind: str, llama: PreTrainedModel, ids: Tensor
    ) -> None:
        for sparsity in (0.2, 0.5, 0.65):
            problem = problem_of(space_of_kind(llama, kind), sparsity, dense_of(llama, ids))
            if not fits(name, kind):
                with pytest.raises(InputError, match=f"strategy={name} is for .*; use ") as error:
                    run(RULES[name], problem)
                assert "\n" not in str(error.value)
                continue
            state, rows = run(RULES[name], problem)
            assert problem.allows(state.parent)
            assert state.generation == RULES[name].generations == (3 if name == "bonsai" else 1)
            assert state.fitness is None and not state.exhausted
            assert all(type(level) is int for level in state.parent)
            assert bool(rows) == (name == "bonsai")
            assert through_json(state) == state

    @pytest.mark.sampled
    @pytest.mark.parametrize("name", RULES)
    def test_every_family(self, name: str, any_model: PreTrainedModel, ids: Tensor) -> None:
        kinds = (
            ["weights", "blocks"]
            if any_model.config.model_type.startswith("mamba")
            else ["KV groups", "weights", "blocks"]
        )
        for kind in kinds:
            if fits(name, kind):
                problem = problem_of(space_of_kind(any_model, kind), 0.4, dense_of(any_model, ids))
                state, _ = run(RULES[name], problem)
                assert problem.allows(state.parent)

    @pytest.mark.sampled
    @pytest.mark.parametrize("name", NO_MODEL)
    @pytest.mark.parametrize("seed", range(30))
    def test_odd_spaces(self, name: str, seed: int, random_space: SpaceOf) -> None:
        space = random_space(seed, units=6, levels=5)
        problem = problem_of(space, within_reach(space, 0.6))
        state, _ = run(RULES[name], problem)
        assert problem.allows(state.parent)

    @pytest.mark.parametrize("name", RULES)
    def test_the_same_seed_gives_the_same_and_a_checkpoint_goes_on(
        self, name: str, llama: PreTrainedModel, ids: Tensor
    ) -> None:
        problem = problem_of(
            space_of_kind(llama, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(llama, ids)
        )
        before = RULES[name].begin(problem, 3)
        assert before.parent == problem.start and before.generation == before.tokens == 0
        first, second = (RULES[name].advance(problem, state) for state in (before, through_json(before)))
        assert first[0] == second[0]
        assert [(r.allocation, r.fitness, r.step) for r in first[1]] == [
            (r.allocation, r.fitness, r.step) for r in second[1]
        ]

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
            problem_of(
                space_of_kind(model, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(model, ids)
            ),
        )
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("name", [name for name in RULES if name not in NO_MODEL])
    def test_tokens_are_counted(self, name: str, llama: PreTrainedModel, ids: Tensor) -> None:
        problem = problem_of(
            space_of_kind(llama, "sub-blocks" if name == "shortgpt" else "KV groups"), 0.5, dense_of(llama, ids)
        )
        state, _ = run(RULES[name], problem)
        assert state.tokens == (0 if name.startswith("alpha") else ids.numel())
        rule = RULES[name]
        assert ("calibration text" in rule.looks_at) == (state.tokens > 0) and rule.tokens_per_generation == 0

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


def test_on_a_built_supernet_of_weights(llama: PreTrainedModel, ids: Tensor, tmp_path: Any) -> None:
    pruner = WandaPruner()
    window = Grid(5, 0.25).first(pruner.prunables(sub_blocks(llama)))
    supernet = Supernet.open_or_create(tmp_path, window.space, {})
    budget = Budget.from_sparsity(0.5, window.space)
    start = uniform(window.space, budget)
    calibration = Calibration(ids, batch=2)
    build(
        llama,
        calibration,
        pruner,
        supernet,
        mixture(window, "none", start),
        torch.device("cpu"),
        lambda s, _: s,
        "test",
        {},
    )
    evaluator = GenerationEvaluator(llama, supernet, ids, KlDivergence())
    problem = Problem(window.space, budget, start, evaluator, dense_of(llama, ids), supernet=supernet)
    for rule in (
        Uniform(),
        Owl(),
        AlphaPruning(by="layer"),
        Flap(),
        AdaptPruner(sequences=2),
        Bonsai(samples=8, tokens=24),
    ):
        state, _ = run(rule, problem)
        assert problem.allows(state.parent)
    evaluator.close()
