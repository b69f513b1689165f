"""What is exported is the model in memory, whole or not at all, and needs nothing of this project to load."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from search.data import PydocTopics, prepare
from search.export.huggingface import export
from search.models import random_llama
from supernet.architecture import parameter_count
from supernet.assemble import assemble
from supernet.errors import InputError
from supernet.modeling_pruned import PrunedLlamaForCausalLM
from supernet.store import Supernet

MIXED = (1, 0, 2, 1, 0, 2, 3, 3)  # block 3 loses attention and MLP
ALIKE = (2, 2, 2, 2, 2, 2, 2, 2)

Assembled = Callable[[tuple[int, ...]], PreTrainedModel]


@pytest.fixture(scope="module")
def assembled(random_supernet: Callable[[PreTrainedModel], Supernet]) -> Assembled:
    """The model of an allocation of a random Llama, assembled in memory."""
    dense = random_llama(0, 64, 96, 4, 8, 4, dtype=torch.float32).model
    supernet = random_supernet(dense)
    return lambda allocation: assemble(dense, supernet, allocation)


@pytest.mark.parametrize(
    ("allocation", "trust", "expected"),
    [(MIXED, True, PrunedLlamaForCausalLM), (ALIKE, False, LlamaForCausalLM)],
    ids=["mixed", "alike: the stock architecture, no trust needed"],
)
def test_an_export_is_the_model_in_memory_in_a_fresh_process(
    allocation: tuple[int, ...],
    trust: bool,
    expected: type,
    assembled: Assembled,
    byte_tokenizer: PreTrainedTokenizerBase,
    reload: Callable[..., dict[str, Any]],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = assembled(allocation)
    export(model, byte_tokenizer, tmp_path / "export", lambda _: "# A card\n")
    found = reload(tmp_path / "export", ids, trust)
    assert found["class"] == expected.__name__ == type(model).__name__
    assert found["parameters"] == parameter_count(model)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(ids).logits, rtol=1e-5, atol=1e-5)
    assert found["generated"] == 8 and found["text"]
    assert (tmp_path / "export/modeling_pruned.py").exists() == trust
    assert (tmp_path / "export/README.md").read_text() == "# A card\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "in place of an older one"])
def test_an_interrupted_export_leaves_no_half_folder(
    error: BaseException,
    before: bool,
    assembled: Assembled,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "export"
    if before:
        folder.mkdir()
        (folder / "older").touch()

    def stop(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(byte_tokenizer), "save_pretrained", stop)  # the weights are written by then
        with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as refusal:
            export(assembled(MIXED), byte_tokenizer, folder, lambda _: "")
    assert (str(folder) in str(refusal.value)) == isinstance(error, OSError)
    assert folder.exists() == before and (folder / "older").exists() == before

    export(assembled(MIXED), byte_tokenizer, folder, lambda _: "")
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert (folder / "model.safetensors").exists() and not (folder / "older").exists()


@torch.no_grad()
def test_the_export_of_a_run_is_the_model_of_its_metrics(
    call: Callable[..., CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert call("+experiment=smoke").returncode == 0
    run = tmp_path / "outputs/search/smoke"
    metrics = json.loads((run / "metrics.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(run / "export", trust_remote_code=True)
    assert parameter_count(loaded) == metrics["searched"]["parameters"] < metrics["dense"]["parameters"]
    dense = random_llama(0, 64, 256, 4, 8, 4, dtype=torch.float32)  # as in conf/model/tiny_llama.yaml
    sequences = {"calibration": 16, "search": 16, "evaluation": 8}
    ids = prepare(PydocTopics(), dense.tokenizer, sequences, 64, seed=0)["evaluation"].ids
    for name, model in (("dense", dense.model), ("searched", loaded)):
        loss = model(ids, labels=ids).loss
        assert metrics[name]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
        logits, target = (m(ids).logits.log_softmax(-1).flatten(0, 1) for m in (model, dense.model))
        divergence = torch.nn.functional.kl_div(logits, target, reduction="batchmean", log_target=True)
        assert metrics[name]["kl_divergence"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
    units = json.loads((run / "allocation.json").read_text())["units"]
    kept = {unit["name"]: unit["kept"] for unit in units if unit["kind"] == "mlp" and unit["kept"]}
    assert {name: loaded.get_submodule(name).gate_proj.out_features for name in kept} == kept
    card = (run / "export/README.md").read_text()
    assert "25.0%" in card and f"{metrics['searched']['perplexity']:.2f}" in card
