"""CUDA computes what the CPU does: a build, a generation, the gradient, a latency, an export and a whole run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from local_prune.methods.depth import DepthPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.taylor import TaylorPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import Calibration, Pruner
from local_prune.walk import build
from search.budgets.latency import LatencyTable
from search.budgets.timing import Request
from search.evaluation.fitness import KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.resources import Resources
from search.paths import CACHE_VARIABLE
from search.run.levels import Grid, mixture
from supernet.candidates import Members, Quantised, Weights, count
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import assemble
from supernet.models.prunables import presence_prunables
from supernet.space import Allocation
from supernet.store import Supernet
from tests.exports import export

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

CUDA = "cuda"
CPU = "cpu"
AGREEING = 0.97  # share of equal choices: sums in another order decide near ties the other way

ModelOf = Callable[..., PreTrainedModel]
SupernetMaker = Callable[[PreTrainedModel], Supernet]
Draw = Callable[..., Sequence[Allocation]]

PRUNERS: dict[str, Pruner] = {
    "obs": ObsPruner(multiple=8),
    "flap": FlapPruner(8),
    "taylor": TaylorPruner(8),
    "wanda": WandaPruner(),
    "gblm": GblmPruner(),
    "sparsegpt": SparseGptPruner(),
    "sparsegpt 2:4": SparseGptPruner("2:4"),
    "gptq": GptqPruner([4, 2], 16),
    "depth": DepthPruner(),
}


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


@pytest.mark.parametrize("fit", ["pruned", "residual"])
@pytest.mark.parametrize("name", PRUNERS)
def test_a_build(name: str, fit: str, model_of: ModelOf, ids: Tensor, tmp_path: Path) -> None:
    """Without accumulation, so that a near tie does not change what comes behind it."""
    model, pruner = model_of("llama"), PRUNERS[name]
    window = Grid(4, 0.25).first(pruner.prunables(sub_blocks(model)))
    seen = mixture(window, "none", (0,) * len(window.space.units))
    supernets = []
    for device in (CPU, CUDA):
        supernet = Supernet.open_or_create(tmp_path / device, window.space, {})
        build(model, Calibration(ids, 2, fit), pruner, supernet, seen, device, lambda items, _: items, "")
        supernets.append(supernet)
    assert {parameter.device.type for parameter in model.parameters()} == {CPU}  # lent blocks came back
    for index, unit in enumerate(window.space.units):
        for level in range(1, len(unit.levels)):
            expected, found = (supernet.candidate(index, level) for supernet in supernets)
            assert count(found) == count(expected) == unit.levels[level].kept
            if isinstance(expected, Members):
                members = torch.zeros(2, unit.total, dtype=torch.bool)
                members[0, expected.kept], members[1, found.kept] = True, True
                assert agreement(*members) >= AGREEING
            if isinstance(expected, Weights):
                assert agreement(found.mask, expected.mask) >= AGREEING
            if isinstance(expected, Quantised):
                assert agreement(found.codes, expected.codes) >= AGREEING
        on_cpu, on_cuda = (supernet.manifest["units"][unit.name].get("errors") for supernet in supernets)
        assert on_cuda == (None if on_cpu is None else pytest.approx(on_cpu, rel=0.02, abs=1e-4))


@pytest.mark.parametrize("resident", ["model", "blocks"])
@pytest.mark.parametrize("name", ["llama_with_biases", "gemma3", "gpt2"])
def test_a_generation(
    name: str, resident: str, model_of: ModelOf, random_supernet: SupernetMaker, random_allocations: Draw, ids: Tensor
) -> None:
    model = model_of(name)
    supernet, chosen = random_supernet(model), np.array([3, 0, 4])
    generation = [*random_allocations(supernet.space, 6), (3,) * 6, (0,) * 6]
    expected = GenerationEvaluator(model, supernet, ids, KlDivergence())(generation, chosen)
    resources = Resources(torch.device(CUDA), resident)
    found = GenerationEvaluator(model, supernet, ids, KlDivergence(), resources)(generation, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert expected[0].min() > 1e-3
    assert {parameter.device.type for parameter in model.parameters()} == {CUDA if resident == "model" else CPU}


@pytest.mark.parametrize("resident", ["model", "blocks"])
@pytest.mark.parametrize("name", ["llama_with_biases", "gemma3", "gpt2"])
def test_the_gradient(name: str, resident: str, model_of: ModelOf, random_supernet: SupernetMaker, ids: Tensor) -> None:
    model = model_of(name)
    supernet, chosen, allocation = random_supernet(model), np.array([3, 0, 4]), (1, 2, 0, 1, 2, 1)
    expected = GenerationEvaluator(model, supernet, ids, KlDivergence()).effects(allocation, chosen)
    resources = Resources(torch.device(CUDA), resident)
    found = GenerationEvaluator(model, supernet, ids, KlDivergence(), resources).effects(allocation, chosen)
    largest = max(float(np.abs(one).max()) for one in expected)
    assert largest > 1e-3
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-3, atol=1e-3 * largest)


def test_a_latency(model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model = model_of("llama").to(CUDA)  # type: ignore[arg-type]
    prunables = presence_prunables(sub_blocks(model), False)
    space = Grid(2, 0.5).first(prunables).space
    table = LatencyTable(model, Request(batch=2, prompt=8, generated=2), torch.device(CUDA), model.dtype)
    table.measure(space, lambda items, _: items)
    costs = table.costs(space)
    assert costs.dense > 0 and all(row[0] >= row[-1] == 0 for row in costs.costs)
    record = json.loads(table.path.read_text())
    assert record["key"]["device"] == torch.cuda.get_device_name(0)


@torch.no_grad()
def test_an_export(
    model_of: ModelOf,
    random_supernet: SupernetMaker,
    byte_tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model on the GPU: loaded on the CPU it says the same."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model_of("llama")
    supernet = random_supernet(model)
    expected = assemble(model, supernet, (1, 2, 0, 1, 2, 0))(ids).logits
    model.to(CUDA)  # type: ignore[arg-type]
    pruned = assemble(model, supernet, (1, 2, 0, 1, 2, 0))
    torch.testing.assert_close(pruned(ids.to(CUDA)).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    export(pruned, byte_tokenizer, tmp_path / "export", lambda _: "")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_whole_run(call: Callable[..., CompletedProcess[str]], finished: Path, tmp_path: Path) -> None:
    process = call("+experiment=smoke", f"device={CUDA}", "dtype=float32", "supernet.root=supernets")
    assert (process.returncode, process.stderr) == (0, "")
    run = Path("outputs/search/smoke")
    expected, found = (json.loads((folder / run / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for name in ("dense", "uniform"):
        assert found[name]["parameters"] == expected[name]["parameters"]
        assert found[name]["perplexity"] == pytest.approx(expected[name]["perplexity"], rel=0.02)
    assert found["searched"]["kl_divergence"] < 1.1 * found["uniform"]["kl_divergence"]
    assert any("peak_device_memory_bytes" in cost for cost in found["stages"].values())
