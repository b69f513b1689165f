"""A pruned model computes what the dense one does without the removed columns: built, loaded, with caches."""
# mypy: allow-untyped-calls

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from supernet.candidates import Members, member_columns
from supernet.models import modeling_pruned
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.families import heads_of
from supernet.models.modeling_pruned import PRUNED_CLASSES, PrunedMixin, SkippedAttn
from supernet.models.placement import sliced
from supernet.space import ATTENTION

pytestmark = pytest.mark.usefixtures("remote_code_stays_here")

GROUPS, NEURONS, WINDOW = 4, 96, 6
TINY: dict[str, Any] = {
    "vocab_size": 300,  # more than a tokenizer of bytes has
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES: dict[str, Any] = TINY | {
    "intermediate_size": NEURONS,
    "num_attention_heads": 2 * GROUPS,
    "num_key_value_heads": GROUPS,
    "head_dim": 8,
}
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW}
GEMMA: dict[str, Any] = {"sliding_window": WINDOW, "query_pre_attn_scalar": 6}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Layer 0 loses its attention (see KEPT): in qwen3 the only one that is not sliding, in mistral a sliding one.
DENSE_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, **WINDOWED, max_window_layers=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, **WINDOWED, max_window_layers=1),
    "gemma2": Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    "gemma3_text": Gemma3TextConfig(**SIZES, **GEMMA, layer_types=[LOCAL, LOCAL, GLOBAL, GLOBAL]),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW),
    "opt": OPTConfig(**TINY, ffn_dim=NEURONS, num_attention_heads=GROUPS, max_position_embeddings=64),
    "gpt2": GPT2Config(**TINY, n_inner=NEURONS, n_head=GROUPS, n_positions=64),
}
FAMILIES = sorted(DENSE_CONFIGS)
MLP_SIZE = {"opt": "ffn_dim", "gpt2": "n_inner"}
OWN_BIAS = ("opt", "gpt2")  # whose output projections have one anyway


@dataclass(frozen=True)
class Kept:
    """What is left of a layer, and which of its sub-blocks make up for the rest with a bias."""

    groups: Sequence[int]
    neurons: Sequence[int]
    biases: Sequence[str] = ()

    def of(self, part: SubBlock) -> Members:
        members = self.groups if part.kind == ATTENTION else self.neurons
        bias = torch.linspace(-1.0, 1.0, TINY["hidden_size"]) if part.kind in self.biases else None
        return Members(torch.tensor(members, dtype=torch.long), None, bias)

    def overrides(self, family: str) -> dict[str, Any]:
        overrides: dict[str, Any] = {"skip": []}
        if self.groups and family in OWN_BIAS:
            overrides["n_head" if family == "gpt2" else "num_attention_heads"] = len(self.groups)
        elif self.groups:
            overrides |= {"num_key_value_heads": len(self.groups), "num_attention_heads": 2 * len(self.groups)}
        else:
            overrides["skip"].append("attention")
            overrides |= {"n_head": 1} if family == "gpt2" else {"num_attention_heads": 1}
            overrides |= {} if family in OWN_BIAS else {"num_key_value_heads": 1}
        if self.neurons:
            overrides[MLP_SIZE.get(family, "intermediate_size")] = len(self.neurons)
        else:
            overrides["skip"].append("mlp")
            overrides[MLP_SIZE.get(family, "intermediate_size")] = 1
        return overrides | ({"output_bias": list(self.biases)} if self.biases and family not in OWN_BIAS else {})


KEPT = (
    Kept(groups=(), neurons=range(0, NEURONS, 3), biases=("mlp",)),
    Kept(groups=(0, 2, 3), neurons=range(10, 43), biases=("attention", "mlp")),
    Kept(groups=(1,), neurons=()),
    Kept(groups=range(GROUPS), neurons=range(NEURONS)),
)
NO_MLP = tuple(Kept(groups=range(GROUPS), neurons=()) for _ in KEPT)
NO_ATTENTION = tuple(Kept(groups=(), neurons=kept.neurons) for kept in KEPT)


def dense_model(family: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(DENSE_CONFIGS[family])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name or ".ln_" in name), std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def zero_removed(model: PreTrainedModel, kept: Sequence[Kept]) -> None:
    """The definition of pruning: what the removed heads and neurons would have added is not there."""
    for part in sub_blocks(model):
        assert part.groups is not None
        candidate = kept[part.block].of(part)
        weight, output = part.weight(part.column), part.module.get_submodule(part.column)
        mask = torch.zeros(weight.shape[1]).index_fill_(0, member_columns(candidate.kept, part.groups.width), 1.0)
        weight.mul_(mask)
        if candidate.bias is not None:
            output.bias = nn.Parameter(candidate.bias)
        elif not len(candidate.kept) and output.bias is not None:
            output.bias.zero_()


def sliced_weights(model: PreTrainedModel, kept: Sequence[Kept]) -> dict[str, torch.Tensor]:
    """The dense model's weights without those of removed heads, neurons and sub-blocks."""
    weights = dict(model.state_dict())
    for part in sub_blocks(model):
        candidate = kept[part.block].of(part)
        if len(candidate.kept):
            weights |= {part.state_name(name): tensor for name, tensor in sliced(part, candidate).items()}
        else:
            weights = {name: tensor for name, tensor in weights.items() if name not in part.own_state}
    return weights


def pruned_config(family: str, kept: Sequence[Kept]) -> PreTrainedConfig:
    dense = DENSE_CONFIGS[family]
    settings = dense.to_dict() | {
        "per_layer_config": {index: left.overrides(family) for index, left in enumerate(kept)},
        "head_dim": heads_of(dense).dim,
        "output_bias": [],
    }
    del settings["model_type"]
    made: PreTrainedConfig = PRUNED_CLASSES[family].config_class(**settings)
    return made


def pruned_model(family: str, kept: Sequence[Kept] = KEPT) -> PrunedMixin:
    model = PRUNED_CLASSES[family](pruned_config(family, kept))
    model.load_state_dict(sliced_weights(dense_model(family), kept), assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def export(model: PrunedMixin, folder: Path) -> Path:
    name = type(model).__name__
    model.config.auto_map = {
        "AutoConfig": f"modeling_pruned.{type(model.config).__name__}",
        "AutoModel": f"modeling_pruned.{name.replace('ForCausalLM', 'Model')}",
        "AutoModelForCausalLM": f"modeling_pruned.{name}",
    }
    model.save_pretrained(folder)
    shutil.copy(modeling_pruned.__file__, folder)
    return folder


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model: Any, ids: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The continued token ids (batch, length + 10) and the logits of the new ones (batch, 10, vocab)."""
    out = model.generate(
        ids, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.sampled
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
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)

    # Servers such as vLLM build the model without its head.
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    expected = model.base_model(tokens()).last_hidden_state
    torch.testing.assert_close(headless(tokens()).last_hidden_state, expected, rtol=0, atol=0)

    # What was loaded can be saved and loaded once more, code included.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_a_checkpoint_loads_where_this_project_is_not_imported(
    family: str, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, reload: Callable[..., dict[str, Any]]
) -> None:
    model = pruned_model(family)
    byte_tokenizer.save_pretrained(export(model, tmp_path / "export"))
    found = reload(tmp_path / "export", tokens())
    assert found["class"] == type(model).__name__
    torch.testing.assert_close(found["logits"], model(tokens()).logits, rtol=0, atol=0)
    prompt = byte_tokenizer("The for statement", return_tensors="pt").input_ids
    generated = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert found["text"] == byte_tokenizer.decode(generated[0, prompt.shape[1] :])


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kept", [KEPT, NO_ATTENTION], ids=["mixed", "no_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_the_full_forward(family: str, kept: Sequence[Kept], cache: str | None) -> None:
    model = pruned_model(family, kept)
    sequences, logits = greedy(model, tokens(), cache_implementation=cache)
    full = model(sequences[:, :-1], use_cache=False).logits[:, tokens().shape[1] - 1 :]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(0)
@pytest.mark.parametrize("kept", [KEPT, NO_ATTENTION, NO_MLP], ids=["mixed", "no attention", "no mlp"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_whoever_does_not_trust_the_file_gets_an_error(
    family: str, kept: Sequence[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(pruned_model(family, kept), tmp_path / "export")
    heads: list[Any] = [AutoModelForSequenceClassification, AutoModelForTokenClassification]
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers asks whether to run the file
    for loader in (AutoModel, AutoModelForCausalLM, *heads):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loader.from_pretrained(folder)
    for loader in heads:  # the file has no such model
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            loader.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(RuntimeError, match="per-layer attribute"):  # a stock class by its own name
        type(dense_model(family)).from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_a_prompt_in_chunks_gives_the_same_text(family: str, cache: str | None) -> None:
    model = pruned_model(family)
    whole, _ = greedy(model, tokens())
    chunked, _ = greedy(model, tokens(), cache_implementation=cache, prefill_chunk_size=4)
    assert torch.equal(chunked, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_skipped_attention_counts_in_a_cache_by_either_name(name: str) -> None:
    cache = DynamicCache()
    SkippedAttn(0, heads=2, channels=8)(hidden_states=torch.ones(3, 5, 64), **{name: cache})
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape == (3, 2, 5, 8)


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
    ids[0, :5] = TINY["pad_token_id"]
    _, logits = greedy(model, ids, attention_mask=(ids != TINY["pad_token_id"]).long())
    _, alone = greedy(model, ids[:1, 5:])
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma2"}))  # which has no other, for its soft caps
def test_a_change_of_attention_implementation_reaches_every_layer(family: str) -> None:
    model = pruned_model(family)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(tokens()).logits
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True)
    torch.testing.assert_close(out.logits, sdpa, rtol=1e-4, atol=1e-4)
    heads = [attention.shape[1] for attention in out.attentions]  # eager alone returns them; layer 0 has none
    queries = 1 if family in OWN_BIAS else 2
    assert heads == [len(left.groups) * queries for left in KEPT if left.groups]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_computes_the_same_with_a_config_of_its_own(family: str) -> None:
    model = pruned_model(family)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)
    copied.config._attn_implementation = "eager"
    implementations = {module.config._attn_implementation for module in copied.modules() if hasattr(module, "config")}
    assert implementations == {"eager"}


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
    assert type(config)(**{name: value for name, value in before.items() if name != "model_type"}).to_dict() == before
