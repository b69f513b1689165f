"""Every method from the command line: a build by each, and whole runs whose exported models are what their allocations
say.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from search.inputs.models import LoadedModel, random_llama
from search.paths import CACHE_VARIABLE, conf_dir
from supernet.models.architecture import parameter_count

Call = Callable[..., CompletedProcess[str]]

METHODS = sorted(file.stem for file in (conf_dir() / "prune").glob("*.yaml"))
SMALL = ("+experiment=smoke", "rounds=1", "strategy.generations=2", "data.sequences.calibration=8")
RUN = Path("outputs/search/smoke")
WIDTH = 8  # channels of a head


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def manifest(cache: Path) -> dict[str, Any]:
    (file,) = cache.glob("supernets/*/manifest.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds(method: str, call: Call, cache: Path) -> None:
    process = call(*SMALL, f"prune={method}", "stages=[build]")
    assert (process.returncode, process.stderr) == (0, "")
    content = manifest(cache)
    assert content["units"].keys() == {unit["name"] for unit in content["space"]}
    assert len({unit["name"] for unit in content["space"]}) in (8, 28)  # sub-blocks or linear layers of four blocks


@pytest.mark.parametrize(
    ("arguments", "budget", "survey"),
    [
        (["prune=obs"], "184,320 of 245,760 prunable parameters", False),
        (["prune=taylor"], "184,320 of 245,760 prunable parameters", True),
        (["prune=gblm"], "184,320 of 245,760 prunable parameters", True),
        (["prune=gptq", "budget=bits", "budget.bits=6"], "1,474,560 of 7,864,320 prunable bits", False),
        (["prune=depth"], "184,320 of 245,760 prunable parameters", False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_says_what_a_build_would_cost(
    arguments: list[str], budget: str, survey: bool, call: Call, cache: Path, tmp_path: Path
) -> None:
    process = call("+experiment=smoke", "dry_run=true", *arguments)
    assert (process.returncode, process.stderr) == (0, "")
    for part in (budget, " units, ", " s, ", " on disk", " for the model", " for activations", "forward tokens"):
        assert part in process.stdout, part
    assert not cache.exists() and not (tmp_path / RUN / "checkpoint").exists()


# Whole runs


@dataclass(frozen=True)
class Outcome:
    """What a run left, and the dense model that it began with."""

    allocation: dict[str, Any]
    metrics: dict[str, Any]
    config: dict[str, Any]
    model: PreTrainedModel
    dense: PreTrainedModel

    @property
    def units(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.allocation["units"]
        return found

    def weight(self, name: str) -> Tensor:
        """Of a linear layer of the exported model."""
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def dense_weight(self, name: str) -> Tensor:
        weight = self.dense.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight


@pytest.fixture
def run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: LoadedModel) -> Callable[..., Outcome]:
    """Runs all stages with these arguments and loads what was exported."""

    def outcome(*arguments: str) -> Outcome:
        process = call(*SMALL, *arguments)
        assert (process.returncode, process.stderr) == (0, "")
        folder = tmp_path / RUN / "export"
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", list(sys.path))
        trust = (folder / "modeling_pruned.py").exists()
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype="auto")
        read = [json.loads((tmp_path / RUN / name).read_text()) for name in ("allocation.json", "metrics.json")]
        found = Outcome(*read, json.loads((folder / "config.json").read_text()), model, tiny_llama.model)
        assert_consistent(found)
        return found

    return outcome


def assert_consistent(found: Outcome) -> None:
    """What holds of every method."""
    budget = found.allocation["budget"]
    assert 0 < budget["achieved"] <= budget["target"] < budget["dense"]
    assert budget["achieved"] == sum(unit["cost"] for unit in found.units)
    assert len({unit["level"] for unit in found.units}) > 1
    for name in ("uniform", "searched"):
        assert found.metrics[name]["kl_divergence"] > 1e-5
        assert math.isfinite(found.metrics[name]["perplexity"])
    assert found.metrics["searched"]["parameters"] == parameter_count(found.model)
    with torch.no_grad():
        ids = torch.arange(48).view(2, 24)
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (found.dense, found.model))
    assert float((p.exp() * (p - q)).sum(-1).mean()) > 1e-5  # it is not the dense model


@pytest.fixture
def tiny_llama() -> LoadedModel:
    """The model of the smoke experiment, in its dtype."""
    return random_llama(0, 64, 256, 4, 8, 4, dtype=torch.float32)


def test_flap_leaves_smaller_layers_with_biases(run: Callable[..., Outcome]) -> None:
    found = run("prune=flap")
    for unit in found.units:
        attention = unit["kind"] == "attention"
        column = f"{unit['name']}.{'o_proj' if attention else 'down_proj'}"
        if unit["kept"] == 0:
            continue
        layer = found.model.get_submodule(column)
        assert layer.weight.shape == (64, unit["kept"] * (2 * WIDTH if attention else 1))
        assert (layer.bias is not None and bool(layer.bias.any())) == (unit["kept"] < unit["total"])


def test_query_heads_are_taken_out_and_keys_stay(run: Callable[..., Outcome]) -> None:
    found = run("prune=obs", "prune.query_heads=true", "strategy=evopress", "strategy.generations=1")
    heads = [unit for unit in found.units if unit["kind"] == "heads"]
    assert {unit["total"] for unit in heads} == {8}
    assert any(0 < unit["kept"] < 8 for unit in heads)
    for unit in heads:
        if unit["kept"]:
            assert found.weight(f"{unit['name']}.o_proj").shape == (64, unit["kept"] * WIDTH)
            assert found.weight(f"{unit['name']}.q_proj").shape == (unit["kept"] * WIDTH, 64)
            assert torch.equal(found.weight(f"{unit['name']}.k_proj"), found.dense_weight(f"{unit['name']}.k_proj"))


def test_sparsegpt_leaves_as_many_weights_as_the_allocation_says(run: Callable[..., Outcome]) -> None:
    found = run("prune=sparsegpt", "budget.sparsity=0.3")
    assert "per_layer_config" not in found.config and type(found.model) is type(found.dense)
    for unit in found.units:
        weight, dense = found.weight(unit["name"]), found.dense_weight(unit["name"])
        assert int(weight.count_nonzero()) == unit["kept"]
        assert torch.equal(weight, dense) == (unit["kept"] == unit["total"])
        if unit["kept"] < unit["total"]:
            assert (weight[weight != 0] != dense[weight != 0]).float().mean() > 0.5  # refitted


def test_wanda_with_a_pattern_keeps_two_of_four(run: Callable[..., Outcome]) -> None:
    found = run("prune=wanda", "prune.pruner.pattern=2:4")
    assert {unit["sparsity"] for unit in found.units} == {0.0, 0.5}
    for unit in found.units:
        weight, dense = found.weight(unit["name"]), found.dense_weight(unit["name"])
        kept = (weight != 0).view(-1, 4).sum(1)
        assert set(kept.tolist()) == ({4} if unit["level"] == 0 else {2})
        assert torch.equal(weight[weight != 0], dense[weight != 0])


def test_gptq_meets_an_average_of_bits(run: Callable[..., Outcome]) -> None:
    found = run("prune=gptq", "prune.pruner.group=32", "budget=bits", "budget.bits=6")
    budget = found.allocation["budget"]
    assert (budget["kind"], budget["target"]) == ("bits", 6 * 245_760)
    assert budget["dense"] == 32 * 245_760
    for unit in found.units:
        groups = found.weight(unit["name"]).reshape(-1, 32)
        distinct = max(len(group.unique()) for group in groups)
        if unit["kept"] == 32:
            assert torch.equal(found.weight(unit["name"]), found.dense_weight(unit["name"]))
        else:
            assert distinct <= 2 ** unit["kept"]
            assert unit["cost"] == groups.numel() * unit["kept"] + len(groups) * (32 + 8)


def test_depth_leaves_sub_blocks_out(run: Callable[..., Outcome]) -> None:
    found = run("prune=depth", "budget.sparsity=0.2")  # an MLP, or all attentions: no whole block
    layers = found.config["per_layer_config"]  # of those that differ from the rest
    dropped = [unit for unit in found.units if unit["kept"] == 0]
    assert dropped
    for unit in found.units:
        skipped = layers.get(unit["name"].split(".")[2], {}).get("skip", ())
        assert (unit["kind"] in skipped) == (unit in dropped)


def test_depth_leaves_whole_blocks_out_of_a_plain_model(run: Callable[..., Outcome]) -> None:
    found = run("prune=depth", "prune.pruner.whole_blocks=true")
    present = [index for index, unit in enumerate(found.units) if unit["kept"]]
    assert len(present) == 3
    assert found.config["num_hidden_layers"] == 3 and type(found.model) is type(found.dense)
    for index, block in enumerate(present):
        name = "self_attn.q_proj"
        assert torch.equal(
            found.weight(f"model.layers.{index}.{name}"), found.dense_weight(f"model.layers.{block}.{name}")
        )
