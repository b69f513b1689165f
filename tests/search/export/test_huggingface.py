"""What is exported is the model in memory, whole or not at all, and needs nothing of this project to load."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from search.evaluation.fitness import CrossEntropy, KlDivergence
from search.export.card import Facts, model_card
from search.export.check import Sample
from search.export.reload import sequence_losses
from search.export.rounding import rounded
from search.inputs.data import PydocTopics, prepare
from search.inputs.models import random_llama
from supernet.errors import InputError
from supernet.models.architecture import parameter_count
from supernet.models.assemble import assemble
from supernet.models.modeling_pruned import PrunedLlamaForCausalLM
from supernet.store import Supernet
from tests.exports import export

MIXED = (1, 0, 2, 1, 0, 2, 3, 3)  # block 3 loses attention and MLP
ALIKE = (2, 2, 2, 2, 2, 2, 2, 2)

Assembled = Callable[[tuple[int, ...]], PreTrainedModel]


@pytest.fixture(scope="module")
def assembled(random_supernet: Callable[[PreTrainedModel], Supernet]) -> Assembled:
    """The model of an allocation of a random Llama, assembled in memory."""
    dense = random_llama(0, 64, 96, 4, 8, 4, dtype=torch.float32).model
    supernet = random_supernet(dense)
    return lambda allocation: assemble(dense, supernet, allocation)


@pytest.mark.sampled(0)
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


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("No space left on device"),
    Exception("No space left on device"),
]


@pytest.mark.parametrize(
    "error", [*FULL, KeyboardInterrupt()], ids=["disk full", "safetensors", "tokenizers", "Ctrl-C"]
)
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
        with pytest.raises(InputError if isinstance(error, Exception) else KeyboardInterrupt) as refusal:
            export(assembled(MIXED), byte_tokenizer, folder, lambda _: "")
    assert (str(folder) in str(refusal.value)) == isinstance(error, Exception)
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


def sample(model: PreTrainedModel, ids: torch.Tensor, losses: tuple[float, ...] | None = None) -> Sample:
    """As a run makes it; `losses` stand for what the search measured."""
    return Sample(ids, 0, tuple(sequence_losses(model, ids, 0)) if losses is None else losses)


def test_a_fresh_process_must_find_the_loss_that_the_model_in_memory_has(
    assembled: Assembled,
    byte_tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = assembled(MIXED), tmp_path / "export"
    checked = export(model, byte_tokenizer, folder, lambda found: f"{found}", sample=sample(model, ids))
    assert checked is not None and checked.largest_difference <= checked.tolerance * checked.loss
    assert (folder / "README.md").read_text() == str(checked)

    write = PreTrainedModel.save_pretrained

    def damaged(self: PreTrainedModel, *arguments: Any, **named: Any) -> None:
        with torch.no_grad():
            self.get_output_embeddings().weight.mul_(1.5)
        write(self, *arguments, **named)

    again = assembled(MIXED)
    again.get_output_embeddings().weight = torch.nn.Parameter(
        again.get_output_embeddings().weight.clone(), requires_grad=False
    )
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(InputError, match="a fresh process loads from the export is another model"):
        export(again, byte_tokenizer, folder, lambda _: "damaged", sample=sample(again, ids))
    assert (folder / "README.md").read_text() == str(checked) and {path.name for path in tmp_path.iterdir()} == {
        "export"
    }


def test_the_loss_must_be_what_the_search_measured(
    assembled: Assembled, byte_tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = assembled(ALIKE)
    with pytest.raises(InputError, match="differs by 1 from what the search measured"):
        losses = tuple(loss + 1 for loss in sequence_losses(model, ids, 0))
        export(model, byte_tokenizer, tmp_path / "export", lambda _: "", sample=sample(model, ids, losses))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_the_dtype_asked_for_is_written_and_what_is_measured_are_its_weights(
    assembled: Assembled, byte_tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = rounded(assembled(MIXED), torch.bfloat16)
    logits = model(ids).logits
    export(model, byte_tokenizer, tmp_path / "export", lambda _: "", torch.bfloat16)
    with safe_open(tmp_path / "export/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"
    loaded = PrunedLlamaForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, logits)
    with pytest.raises(InputError, match="export.dtype=float16 cannot hold weights as large"):
        large = assembled(ALIKE)
        large.get_input_embeddings().weight = torch.nn.Parameter(torch.full((257, 64), 1e6), requires_grad=False)
        rounded(large, torch.float16)


def test_licence_and_tokenizer_files_come_along_and_strangers_code_does_not(
    assembled: Assembled, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    (source / "additional_chat_templates").mkdir(parents=True)
    carried = (
        "LICENSE",
        "Licence.txt",
        "NOTICE",
        "USE_POLICY.md",
        "tokenizer.model",
        "additional_chat_templates/tool.jinja",
    )
    for name in (*carried, "license.py", "evil.py", "README.md", "tokenizer.json"):
        (source / name).write_text("theirs")
    byte_tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
    model = assembled(ALIKE)
    export(model, byte_tokenizer, tmp_path / "export", lambda _: "ours", source=source)
    assert all((tmp_path / "export" / name).read_text() == "theirs" for name in carried)
    assert not list((tmp_path / "export").glob("*.py")) and (tmp_path / "export/README.md").read_text() == "ours"
    assert "theirs" not in (tmp_path / "export/tokenizer.json").read_text()
    assert not any("evil" in file.read_text(errors="replace") for file in (tmp_path / "export").glob("*.json"))


@pytest.mark.parametrize("killed", [False, True], ids=["the swap fails", "killed between two renames"])
def test_an_older_export_is_never_lost(
    killed: bool,
    assembled: Assembled,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "older").touch()
    replace, calls = os.replace, []

    def stop(source: Any, target: Any) -> None:
        calls.append(target)
        if target == folder and str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    if killed:
        folder.rename(tmp_path / ".export.old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(InputError, match="No space left"):
            export(assembled(ALIKE), byte_tokenizer, folder, lambda _: "")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (folder / "older").exists()


def test_the_card_says_what_was_done_with_the_metadata_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama3\nbase_model: some/other\n---\n# Dense\n")
    units = [{"name": "model.layers.0.mlp", "kind": "mlp", "kept": 8, "total": 16}]
    content = {"budget": {"kind": "parameters", "target": 50, "dense": 100, "achieved": 50}, "units": units}
    rule = Facts("org/name", "wanda_sp", "uniform", True, KlDivergence.goal, "bfloat16", True, tmp_path)
    card = ModelCard(model_card(rule, None, content))
    assert card.data.to_dict() == {
        "base_model": "org/name",
        "library_name": "transformers",
        "license": "llama3",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "pruning", "sparsity-search"],
    }
    assert "the rule `uniform`; nothing was searched" in card.text and "searched for" not in card.text
    searched = Facts("./folder", "wanda_sp", "guided", False, CrossEntropy.goal, "bfloat16", False)
    card = ModelCard(model_card(searched, None, content))
    assert "searched for the smallest cross-entropy (strategy `guided`)" in card.text
    assert "base_model" not in card.data.to_dict() and "trust_remote_code" not in card.text
