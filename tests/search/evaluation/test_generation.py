"""A generation in one sweep gives each allocation what it gets assembled and run alone."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.depth import DepthPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import Calibration, Pruner
from local_prune.walk import build
from search.evaluation.fitness import CrossEntropy, Fitness, KlDivergence, TopKDivergence
from search.evaluation.generation import GenerationEvaluator
from search.run.levels import Grid, mixture
from supernet.candidates import Candidate, Dropped, Members
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.assemble import assemble
from supernet.models.prunables import member_prunables
from supernet.space import Allocation
from supernet.store import Supernet
from tests.search.evaluation.alone import Draw, ModelOf, alone, room_for


class InFloat32:
    """A supernet's candidates in float32."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet

        self.space = supernet.space

    def candidate(self, unit: int, level: int, device: torch.device) -> Candidate:
        candidate = self.supernet.candidate(unit, level, device)
        assert isinstance(candidate, Members) and candidate.weight is not None
        return Members(candidate.kept, candidate.weight.float())


@pytest.mark.sampled
@pytest.mark.parametrize("states", [1, 2, 5, 30, 1000])
def test_a_generation_is_measured_as_each_alone(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation], states: int
) -> None:
    evaluate = GenerationEvaluator(
        family_model, family_supernet, ids, KlDivergence(), room_for(states, family_model, ids)
    )
    chosen = np.array([3, 0, 4])
    found = evaluate(generation, chosen)
    expected = [alone(family_model, family_supernet, allocation, ids[chosen]) for allocation in generation]
    assert found.shape == (len(generation), len(chosen))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found[-1], found[1])
    assert np.abs(found[-2]).max() < 2e-6  # the dense allocation


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
@pytest.mark.parametrize("fitness", [CrossEntropy, TopKDivergence])
def test_every_fitness_is_that_of_whole_logits(
    fitness: Callable[..., Fitness],
    hidden_weight: float,
    family_model: PreTrainedModel,
    family_supernet: Supernet,
    ids: Tensor,
    generation: list[Allocation],
) -> None:
    settings: dict[str, Any] = {"k": 7} if fitness is TopKDivergence else {}
    chosen = np.array([3, 0, 4])
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, fitness(hidden_weight=hidden_weight, **settings))
    found = evaluate(generation, chosen)
    text = ids[chosen]
    dense = family_model(text, output_hidden_states=True)
    for allocation, losses in zip(generation, found, strict=True):
        pruned = assemble(family_model, family_supernet, allocation)(text, output_hidden_states=True)
        if fitness is CrossEntropy:
            loss = torch.nn.functional.cross_entropy(pruned.logits[:, :-1].mT, text[:, 1:], reduction="none")
            counted = slice(None, -1)
        else:
            words = dense.logits.topk(7, -1).indices
            p, q = (one.logits.double().gather(-1, words).log_softmax(-1) for one in (dense, pruned))
            loss, counted = (p.exp() * (p - q)).sum(-1), slice(None)
        apart = 1 - torch.cosine_similarity(pruned.hidden_states[-1].double(), dense.hidden_states[-1].double(), dim=-1)
        expected = loss.double().mean(1) + hidden_weight * apart[:, counted].mean(1)
        np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=2e-5)


METHODS: dict[str, Pruner] = {  # for every kind of candidate the methods that make it
    "members, refitted": ObsPruner(multiple=1),
    "members, compensated": FlapPruner(multiple=1),
    "query heads": FlapPruner(multiple=1, query_heads=True, compensate=False),
    "weights": WandaPruner(),
    "weights, refitted, N:M": SparseGptPruner(pattern=["3:4", "2:4", "1:4"]),
    "bits": GptqPruner(bits=(4, 3, 2), group=16),
    "sub-blocks": DepthPruner(),
    "blocks": DepthPruner(whole_blocks=True),
}
MEMBERS = ("members, refitted", "members, compensated", "query heads")
# Gemma 2 caps its logits, GPT-2 keeps its weights transposed, OPT and Phi-3 have fewer of the layers of their own.
CASES = [(name, method) for name in ("llama_with_biases", "gemma2", "gpt2") for method in METHODS]
CASES += [
    (name, method) for name in ("opt", "phi3") for method in ("members, refitted", "members, compensated", "weights")
]
CASES += [(name, method) for name in ("mamba", "mamba2") for method in METHODS if method not in MEMBERS]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_kind_of_candidate_is_measured_as_each_allocation_alone(
    name: str, method: str, model_of: ModelOf, ids: Tensor, tmp_path: Path, random_allocations: Draw
) -> None:
    model, pruner = model_of(name), METHODS[method]
    window = Grid(5, 0.25).first(pruner.prunables(sub_blocks(model)))
    dense, sparsest = (0,) * len(window.space.units), tuple(len(unit.levels) - 1 for unit in window.space.units)
    supernet = Supernet.open_or_create(tmp_path, window.space, {})
    seen = mixture(window, "expectation", dense)
    build(model, Calibration(ids.roll(1, 0)), pruner, supernet, seen, "cpu", lambda items, _: items, "")
    drawn = random_allocations(window.space, 4)
    generation = [*drawn, (*drawn[0][:-1], sparsest[-1]), (sparsest[0], *drawn[1][1:]), sparsest, dense]
    chosen = np.array([3, 0, 4])
    found = GenerationEvaluator(model, supernet, ids, KlDivergence())(generation, chosen)
    expected = [alone(model, supernet, allocation, ids[chosen]) for allocation in generation]
    assert np.min(expected[:-1]) > 1e-3  # far above what rounding does
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_layer_is_read_once_for_all_levels_of_the_others(
    model_of: ModelOf, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries at one level with keys at two others are two sets of weights of the sub-block, but three reads."""
    model, pruner = model_of("llama"), WandaPruner()
    window = Grid(3, 0.25).first(pruner.prunables(sub_blocks(model)))
    dense = (0,) * len(window.space.units)
    supernet = Supernet.open_or_create(tmp_path, window.space, {})
    build(model, Calibration(ids), pruner, supernet, mixture(window, "none", dense), "cpu", lambda items, _: items, "")
    read: list[tuple[int, int]] = []
    whole = supernet.candidate

    def counted(unit: int, level: int, *arguments: str) -> Candidate:
        read.append((unit, level))
        return whole(unit, level, *arguments)

    monkeypatch.setattr(supernet, "candidate", counted)
    rest = dense[2:]
    GenerationEvaluator(model, supernet, ids, KlDivergence())(
        [(1, 1, *rest), (1, 2, *rest), (1, 0, *rest), (0, 2, *rest)], np.arange(5)
    )
    assert sorted(read) == [(0, 1), (1, 1), (1, 2)]


@torch.no_grad()
def test_an_absent_sub_block_is_not_run(
    model_of: ModelOf, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pruner = model_of("llama"), DepthPruner()
    space = Grid(2, 0.5).first(pruner.prunables(sub_blocks(model))).space
    supernet = Supernet.open_or_create(tmp_path, space, {})
    for unit in space.units:
        supernet.write(unit.name, [Dropped()], {})
    evaluate = GenerationEvaluator(model, supernet, ids, KlDivergence())
    evaluate([(0,) * 6], np.arange(5))  # so that the targets are there
    calls: list[str] = []
    run = SubBlock.__call__

    def counted(part: SubBlock, *arguments: object) -> Tensor:
        calls.append(part.name)
        return run(part, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SubBlock, "__call__", counted)
    evaluate([(1, 0, 1, 1, 0, 1)], np.arange(5))
    assert calls == [space.units[1].name, space.units[4].name]


@pytest.mark.sampled(0)
def test_later_calls_meet_the_targets_of_earlier_ones(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, generation: list[Allocation]
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    for chosen in ([0, 1], [1, 2, 4], [4], [3, 2, 1, 0]):  # new, partly known, wholly known, in another order
        found = evaluate(generation[:2], np.array(chosen))
        fresh = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())(
            generation[:2], np.array(chosen)
        )
        np.testing.assert_allclose(found, fresh, rtol=1e-4)


@pytest.mark.sampled(0)
def test_the_pool_says_what_there_is_to_draw_from(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor
) -> None:
    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    assert (evaluate.sequences, evaluate.sequence_length) == tuple(ids.shape)


@pytest.mark.sampled(0)
def test_shared_beginnings_are_run_once(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: Counter[str] = Counter()
    run = SubBlock.__call__

    def counted(part: SubBlock, hidden: Tensor, *others: object) -> Tensor:
        states[part.name] += len(hidden)
        return run(part, hidden, *others)  # type: ignore[arg-type]

    evaluate = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    evaluate([(0,) * 6], np.arange(5))  # so that the targets are there
    monkeypatch.setattr(SubBlock, "__call__", counted)
    evaluate([(1, 1, 0, 0, 0, 1), (1, 1, 0, 0, 0, 2), (1, 1, 0, 2, 0, 2)], np.arange(5))
    names = [unit.name for unit in family_supernet.space.units]
    assert [states[name] for name in names] == [5 * paths for paths in (1, 1, 1, 2, 2, 3)]


def test_bfloat16_finds_the_same_within_its_rounding(
    family_model: PreTrainedModel,
    random_supernet: Callable[[PreTrainedModel], Supernet],
    ids: Tensor,
    generation: list[Allocation],
) -> None:
    model = copy.deepcopy(family_model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    supernet = random_supernet(model)
    found = GenerationEvaluator(model, supernet, ids, KlDivergence())(generation, np.arange(5))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    expected = GenerationEvaluator(model, InFloat32(supernet), ids, KlDivergence())(generation, np.arange(5))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.01)
    assert np.abs(found[-2]).max() < 1e-3  # the dense allocation


@pytest.mark.sampled(0)
def test_an_allocation_that_overflows_is_infinitely_bad_and_the_others_are_measured(
    family_model: PreTrainedModel,
    ids: Tensor,
    random_supernet: Callable[[PreTrainedModel], Supernet],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    supernet = random_supernet(family_model)
    good, bad = (2,) * 6, (2, 2, 1, 2, 2, 2)
    (expected,) = GenerationEvaluator(family_model, supernet, ids, KlDivergence())([good], np.arange(5))
    whole = supernet.candidate

    def overflown(unit: int, level: int, *arguments: Any) -> Candidate:
        candidate = whole(unit, level, *arguments)
        assert isinstance(candidate, Members) and candidate.weight is not None
        return Members(candidate.kept, candidate.weight * torch.inf) if level == 1 else candidate

    monkeypatch.setattr(supernet, "candidate", overflown)
    evaluate = GenerationEvaluator(family_model, supernet, ids, KlDivergence())
    for _ in range(2):
        found = evaluate([bad, good], np.arange(5))
        assert np.isposinf(found[0]).all()
        np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    assert [message for message in caplog.messages if "not finite" in message] == [
        "the loss of an allocation is not finite: such ones lose; dtype=float32 has a wider range"
    ]


def test_a_dense_model_that_overflows_is_told(
    model_of: Callable[..., PreTrainedModel], ids: Tensor, random_supernet: Callable[[PreTrainedModel], Supernet]
) -> None:
    model = model_of("llama")
    supernet = random_supernet(model)
    model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(InputError, match="what the dense model predicts is not finite.*dtype=float32"):
        GenerationEvaluator(model, supernet, ids, KlDivergence())([(1,) * 6], np.arange(5))


@pytest.mark.sampled(0)
def test_an_unfinished_supernet_is_told(family_model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    space = Grid(2, 0.5).first(member_prunables(sub_blocks(family_model), 1)).space
    supernet = Supernet.open_or_create(tmp_path, space, {})
    with pytest.raises(InputError, match="its build is not finished"):
        GenerationEvaluator(family_model, supernet, ids, KlDivergence())([(1,) * 6], np.arange(5))
