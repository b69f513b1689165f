"""Models that are unlike most: heads, tokens, zeros and settings that a loader must not take for something else."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from search.inputs.models import from_pretrained, random_llama
from search.inputs.models.checks import check_config
from supernet.errors import InputError
from supernet.models.families import FAMILIES, family_of_config
from supernet.models.forward import check_walk
from tests.search.inputs.changes import HEAD, IDS, Q_PROJ, SIZES, tensor, weights


def saved(folder: Path, **changes: Any) -> Path:
    """The same folder with a model of another config."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES | changes)).save_pretrained(folder)
    return folder


def test_a_head_that_differs_from_tied_embeddings_stays(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, tie_word_embeddings=True)
    head = torch.randn(257, 16)
    tensor(HEAD, head)(folder)
    with caplog.at_level(logging.INFO):
        model = from_pretrained(str(folder), dtype=torch.float32).model
    assert "its head differs from its embeddings" in caplog.text
    assert torch.equal(model.lm_head.weight, head)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as whatever copies a model does
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, head) and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tied_head_that_is_in_the_file_too_stays_tied(folder: Path) -> None:
    saved(folder, tie_word_embeddings=True)
    weights(lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()}))(folder)
    model = from_pretrained(str(folder), dtype=torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_an_old_gpt2_with_masks_in_its_file(folder: Path) -> None:
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(folder)
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    check_walk(from_pretrained(str(folder), dtype=torch.float32).model)


def test_zeros_that_are_there_already_are_counted_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ][:12] = 0
        tensors["model.layers.0.mlp.down_proj.weight"][:, ::2] = 0
        tensors["model.embed_tokens.weight"][:100] = 0  # no linear layer of a block

    with caplog.at_level(logging.INFO):
        from_pretrained(str(folder), dtype=torch.float32)
        assert "zero already" not in caplog.text
        weights(halve)(folder)
        from_pretrained(str(folder), dtype=torch.float32)
    told = (
        "10.0 % of the weights of its linear layers are zero already, most in model.layers.1.self_attn.q_proj (75.0 %)"
    )
    assert told in caplog.text


def test_the_folder_is_known(folder: Path) -> None:
    assert from_pretrained(str(folder), dtype=torch.float32).folder == folder


def test_special_tokens_may_lie_beyond_the_embeddings(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(from_pretrained(str(folder), dtype=torch.float32).tokenizer) == 258


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(permission denied\); make it readable"):
        from_pretrained(str(folder), dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": 5}, "model.path=5 must be a folder or a hub id"),
        ({"path": "\0"}, "cannot be"),
        ({"path": "x" * 5000}, "cannot be read"),
        ({"path": "a/b", "revision": 3}, "model.revision=3 must be a branch"),
        ({"path": "a/b", "trust_remote_code": "yes"}, "model.trust_remote_code=yes must be true or false"),
    ],
)
def test_arguments_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_pretrained(**settings, dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_key_value_heads": 3}, "model.num_key_value_heads=3 must divide model.num_attention_heads=4"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            "model.num_attention_heads=3 must divide model.hidden_size=16",
        ),
        ({"num_hidden_layers": 0}, "model.num_hidden_layers=0 must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers=1000000000 must be a whole number from 1 to 1,000"),
        ({"hidden_size": "16"}, "model.hidden_size=16 must be a whole number"),
        ({"intermediate_size": 2.5}, "model.intermediate_size=2.5 must be a whole number"),
        ({"seed": -1}, "model.seed=-1 must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "model.tie_word_embeddings=yes must be true or false"),
        ({"hidden_size": 12}, "into heads of an even size"),
    ],
)
def test_a_random_llama_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_llama(**{"seed": 0} | SIZES | settings, dtype=torch.float32)


def test_every_causal_language_model_of_transformers_is_known_or_told() -> None:
    """Of the config alone: multimodal ones have no vocab_size, nor anything else that a text model has."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raw = {"model_type": model_type}
        if model_type in FAMILIES:
            assert check_config(raw, "model") == raw
            continue
        with pytest.raises(InputError, match=f"architecture '{model_type}' is not known"):
            check_config(raw, "model")
        with pytest.raises(InputError, match=f"architecture '{model_type}' is not known"):
            family_of_config(SimpleNamespace(model_type=model_type))
    assert set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_multimodal_model_is_told_before_its_config_is_used() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3"))
    with pytest.raises(InputError, match="architecture 'gemma3' is not known"):
        check_walk(model)
