"""A pruned model computes what the dense one does without the removed columns: built, loaded, with caches."""
# mypy: allow-untyped-calls

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from supernet import modeling_pruned
from supernet.modeling_pruned import PRUNED_CLASSES, PrunedMixin

HEAD_DIM, HEADS_PER_GROUP, GROUPS, NEURONS, WINDOW = 8, 2, 4, 96, 6
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 4,
    "num_attention_heads": GROUPS * HEADS_PER_GROUP,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW}
# Layer 0 loses its attention (see KEPT): in qwen3 the only one that is not sliding, in mistral a sliding one.
DENSE_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, **WINDOWED, max_window_layers=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, **WINDOWED, max_window_layers=1),
}
FAMILIES = sorted(DENSE_CONFIGS)


@dataclass(frozen=True)
class Kept:
    """What is left of a layer."""

    groups: Sequence[int]
    neurons: Sequence[int]

    def overrides(self) -> dict[str, Any]:
        overrides: dict[str, Any] = {"skip": []}
        if self.groups:
            overrides["num_key_value_heads"] = len(self.groups)
            overrides["num_attention_heads"] = len(self.groups) * HEADS_PER_GROUP
        else:
            overrides["skip"].append("attention")
        if self.neurons:
            overrides["intermediate_size"] = len(self.neurons)
        else:
            overrides["skip"].append("mlp")
        return overrides


KEPT = (
    Kept(groups=(), neurons=range(0, NEURONS, 3)),
    Kept(groups=(0, 2, 3), neurons=range(10, 43)),
    Kept(groups=(1,), neurons=()),
    Kept(groups=range(GROUPS), neurons=range(NEURONS)),
)
NO_ATTENTION = tuple(Kept(groups=(), neurons=kept.neurons) for kept in KEPT)


def channels(groups: Sequence[int], heads_per_group: int) -> torch.Tensor:
    """Rows of a projection that belong to the groups."""
    width = heads_per_group * HEAD_DIM
    return torch.arange(GROUPS * width).view(GROUPS, width)[list(groups)].flatten()


def dense_model(family: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(DENSE_CONFIGS[family])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2, generator=generator)
    model.eval()
    return model


def zero_removed(model: PreTrainedModel, kept: Sequence[Kept]) -> None:
    """The definition of pruning: what the removed heads and neurons would have added is not there."""
    for layer, left in zip(model.model.layers, kept, strict=True):
        for weight, columns in (
            (layer.self_attn.o_proj.weight, channels(left.groups, HEADS_PER_GROUP)),
            (layer.mlp.down_proj.weight, torch.tensor(left.neurons, dtype=torch.long)),
        ):
            mask = torch.zeros(weight.shape[1]).index_fill_(0, columns, 1.0)
            weight.data.mul_(mask)


def sliced_weights(model: PreTrainedModel, kept: Sequence[Kept]) -> dict[str, torch.Tensor]:
    """The dense model's weights without those of removed heads, neurons and sub-blocks."""
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = weight
            continue
        _, _, index, block, *rest = name.split(".")
        left, part = kept[int(index)], rest[0]
        attention = block in ("input_layernorm", "self_attn")
        if not (left.groups if attention else left.neurons):
            continue
        neurons = torch.tensor(left.neurons, dtype=torch.long)
        match part:
            case "q_proj":
                weight = weight[channels(left.groups, HEADS_PER_GROUP)]
            case "k_proj" | "v_proj":
                weight = weight[channels(left.groups, 1)]
            case "o_proj":
                weight = weight[:, channels(left.groups, HEADS_PER_GROUP)]
            case "gate_proj" | "up_proj":
                weight = weight[neurons]
            case "down_proj":
                weight = weight[:, neurons]
        weights[name] = weight
    return weights


def pruned_config(family: str, kept: Sequence[Kept]) -> PreTrainedConfig:
    settings = DENSE_CONFIGS[family].to_dict() | {
        "per_layer_config": {index: left.overrides() for index, left in enumerate(kept)},
        "allow_global_per_layer_attribute_access": True,
    }
    return type(DENSE_CONFIGS[family])(**settings)


def pruned_model(family: str, kept: Sequence[Kept] = KEPT) -> PrunedMixin:
    config = pruned_config(family, kept)
    with torch.device("meta"):
        model = PRUNED_CLASSES[family](config)
    model.load_state_dict(sliced_weights(dense_model(family), kept), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no state dict
    model.eval()
    return model


def export(model: PrunedMixin, folder: Path) -> Path:
    name = type(model).__name__
    model.config.auto_map = {
        "AutoModel": f"modeling_pruned.{name.replace('ForCausalLM', 'Model')}",
        "AutoModelForCausalLM": f"modeling_pruned.{name}",
    }
    model.save_pretrained(folder)
    shutil.copy(modeling_pruned.__file__, folder)
    return folder


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model: Any, ids: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The continued token ids (batch, length + 10) and the logits of the new ones (batch, 10, vocab)."""
    out = model.generate(ids, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.fixture(autouse=True)
def _remote_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())


@torch.no_grad()
@pytest.mark.parametrize("kept", [KEPT, NO_ATTENTION], ids=["mixed", "no_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_model_with_zeroed_columns(family: str, kept: Sequence[Kept]) -> None:
    dense = dense_model(family)
    before = dense(tokens()).logits
    zero_removed(dense, kept)
    expected = dense(tokens()).logits
    assert not torch.allclose(before, expected, atol=0.1)
    torch.testing.assert_close(pruned_model(family, kept)(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_config_without_overrides_gives_the_dense_model() -> None:
    dense = dense_model("llama")
    model = PRUNED_CLASSES["llama"](DENSE_CONFIGS["llama"])
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model.eval()(tokens()).logits, dense(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_round_trip(family: str, tmp_path: Path) -> None:
    model = pruned_model(family)
    folder = export(model, tmp_path / "export")

    result: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    loaded, info = result
    assert type(loaded).__name__ == type(model).__name__
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == model.state_dict().keys()
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)

    # Servers such as vLLM build the model without its head.
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    expected = model.model(tokens()).last_hidden_state
    torch.testing.assert_close(headless(tokens()).last_hidden_state, expected, rtol=0, atol=0)

    # What was loaded can be saved and loaded once more, code included.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)


@torch.no_grad()
def test_a_checkpoint_loads_where_this_project_is_not_imported(tmp_path: Path) -> None:
    model = pruned_model("llama")
    export(model, tmp_path / "export")
    torch.save(tokens(), tmp_path / "tokens.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)
ids = torch.load("tokens.pt")
torch.save(model(ids).logits, "logits.pt")
torch.save(model.generate(ids, max_new_tokens=10, do_sample=False), "generated.pt")
assert not {"supernet", "local_prune", "search"} & sys.modules.keys()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert not any(word in process.stderr for word in ("MISSING", "UNEXPECTED", "MISMATCH")), process.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens()).logits, rtol=0, atol=0)
    assert torch.equal(torch.load(tmp_path / "generated.pt"), greedy(model, tokens())[0])


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kept", [KEPT, NO_ATTENTION], ids=["mixed", "no_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_the_full_forward(family: str, kept: Sequence[Kept], cache: str | None) -> None:
    model = pruned_model(family, kept)
    sequences, logits = greedy(model, tokens(), cache_implementation=cache)
    full = model(sequences[:, :-1], use_cache=False).logits[:, tokens().shape[1] - 1 :]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_knows_its_length_where_the_first_layer_has_no_attention(family: str) -> None:
    model = pruned_model(family)
    prompt, rest = tokens()[:, :8], tokens()[:, 8:]
    past = model(prompt, use_cache=True).past_key_values
    assert past.get_seq_length() == 8
    continued = model(rest, past_key_values=past).logits  # no position_ids: they follow from the cache
    torch.testing.assert_close(continued, model(tokens()).logits[:, 8:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_right_after_loading(family: str, tmp_path: Path) -> None:
    folder = export(pruned_model(family), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = tokens()
    ids[0, :5] = SIZES["pad_token_id"]
    _, logits = greedy(model, ids, attention_mask=(ids != SIZES["pad_token_id"]).long())
    _, alone = greedy(model, ids[:1, 5:])
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_attention_implementation_reaches_every_layer(family: str) -> None:
    model = pruned_model(family)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(tokens()).logits
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True)
    torch.testing.assert_close(out.logits, sdpa, rtol=1e-4, atol=1e-4)
    heads = [attention.shape[1] for attention in out.attentions]  # eager alone returns them; layer 0 has none
    assert heads == [len(left.groups) * HEADS_PER_GROUP for left in KEPT if left.groups]


def test_a_config_without_head_dim_is_refused() -> None:
    settings = {name: value for name, value in SIZES.items() if name != "head_dim"}
    with pytest.raises(ValueError, match="head_dim"):
        PRUNED_CLASSES["qwen2"](Qwen2Config(**settings))


def test_the_given_config_is_left_as_it_was() -> None:
    config = pruned_config("qwen3", KEPT)
    before = config.to_dict()
    with torch.device("meta"):
        model = PRUNED_CLASSES["qwen3"](config)
    assert model.config is config
    assert config.to_dict() == before
    assert AutoConfig.for_model(**before).to_dict() == before
