"""The main job on a real language model, through the real command line."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from search.inputs.models import LoadedModel

DEMO = "+experiment=demo"
REDUCED = (
    "data.sequence_length=256",
    "data.sequences={calibration: 8, search: 16, evaluation: 4}",
    "rounds=1",
    "strategy.generations=2",
    "strategy.offspring=6",
    "strategy.proposal_tokens=512",
    "strategy.tokens=1024",
    "strategy.growth=1",
)


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    folder: Path
    output: str

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def demo(folder: Path, run_search: Callable[..., CompletedProcess[str]], *overrides: str, **options: float) -> Outcome:
    process = run_search(folder, DEMO, *overrides, **options)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    return Outcome(folder / "outputs/search/demo", process.stdout)


@pytest.fixture(scope="module")
def reduced(
    smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory, run_search: Callable[..., CompletedProcess[str]]
) -> Outcome:
    """The demo with little text and few generations; `smollm2` has put the converted model into the session's cache."""
    return demo(tmp_path_factory.mktemp("reduced"), run_search, *REDUCED)


@pytest.mark.slow
def test_the_reduced_demo_meets_its_budget(reduced: Outcome) -> None:
    budget = reduced.read("allocation.json")["budget"]
    assert budget["target"] == int(0.75 * budget["dense"])
    assert 0 <= budget["target"] - budget["achieved"] < 0.01 * budget["dense"]
    assert len({unit["sparsity"] for unit in reduced.read("allocation.json")["units"]}) > 1


@pytest.mark.slow
def test_the_reduced_demo_is_not_worse_than_uniform(reduced: Outcome) -> None:
    metrics = reduced.read("metrics.json")
    dense, uniform, searched = (metrics[name] for name in ("dense", "uniform", "searched"))
    assert abs(dense["kl_divergence"]) < 0.01
    assert 5 < dense["perplexity"] < 60  # an English text is known to this model
    assert math.isfinite(searched["perplexity"]) and searched["perplexity"] > dense["perplexity"]
    assert searched["parameters"] < 0.85 * dense["parameters"]  # embeddings are not pruned
    assert abs(searched["parameters"] - uniform["parameters"]) < 0.01 * dense["parameters"]
    assert searched["kl_divergence"] < 1.05 * uniform["kl_divergence"]
    for name in ("dense", "uniform", "searched"):
        assert f"{metrics[name]['parameters']:,}" in reduced.output


@pytest.mark.slow
def test_the_reduced_demo_exports_a_model_that_generates(
    reduced: Outcome, reload: Callable[..., dict[str, Any]]
) -> None:
    found = reload(reduced.folder / "export", torch.arange(32).view(1, 32))
    assert found["parameters"] == reduced.read("metrics.json")["searched"]["parameters"]
    assert found["logits"].isfinite().all()
    assert found["generated"] == 8 and found["text"].strip()


@pytest.mark.slow
def test_the_demo_beats_uniform(
    smollm2: LoadedModel,
    tmp_path: Path,
    run_search: Callable[..., CompletedProcess[str]],
    reload: Callable[..., dict[str, Any]],
) -> None:
    # three quarters of an hour in float32 on two cores of its own
    outcome = demo(tmp_path, run_search, timeout=3 * 3600)
    metrics = outcome.read("metrics.json")
    assert metrics["searched"]["kl_divergence"] < metrics["uniform"]["kl_divergence"]
    assert metrics["searched"]["perplexity"] < metrics["uniform"]["perplexity"]
    assert max(cost["peak_memory_bytes"] for cost in metrics["stages"].values()) < 5e9
    assert (
        reload(outcome.folder / "export", torch.arange(32).view(1, 32))["parameters"]
        == metrics["searched"]["parameters"]
    )


TINY = (
    "rounds=1",
    "supernet.levels=3",
    "supernet.step=0.25",
    "data.sequence_length=128",
    "data.sequences={calibration: 4, search: 8, evaluation: 4}",
    "strategy.generations=1",
    "strategy.offspring=2",
    "strategy.proposal_tokens=256",
    "strategy.tokens=512",
    "hydra.run.dir=run",
)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "fixture"), [("smollm2", "smollm2"), ("gemma3_270m", "gemma")])
def test_a_real_checkpoint_is_built_searched_and_exported(
    model: str,
    fixture: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    run_search: Callable[..., CompletedProcess[str]],
    reload: Callable[..., dict[str, Any]],
) -> None:
    """With next to no text: that all stages hold for weights, tokenizer and activations as they are published."""
    loaded: LoadedModel = request.getfixturevalue(fixture)
    process = run_search(tmp_path, DEMO, f"model={model}", "budget.sparsity=0.1", *TINY, timeout=3600)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    outcome = Outcome(tmp_path / "run", process.stdout)
    budget, metrics = outcome.read("allocation.json")["budget"], outcome.read("metrics.json")
    assert budget["achieved"] <= budget["target"] == int(0.9 * budget["dense"])
    assert 3 < metrics["dense"]["perplexity"] < 100 and abs(metrics["dense"]["kl_divergence"]) < 0.01
    assert 0 < metrics["searched"]["kl_divergence"] < 2
    found = reload(outcome.folder / "export", torch.arange(32).view(1, 32))
    assert found["parameters"] == metrics["searched"]["parameters"] < sum(p.numel() for p in loaded.model.parameters())
    assert found["logits"].isfinite().all() and found["text"].strip()
