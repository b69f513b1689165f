"""Decoders with layers of different sizes: the modelling code of a pruned checkpoint.

If you found this file next to a checkpoint: attention heads and MLP neurons were removed from the model, and not
equally many from every layer. `per_layer_config` in `config.json` says what is left of each layer. What it does not
mention is as in the unpruned model. "skip" names sub-blocks that are gone altogether (the head and neuron counts
beside it are placeholders), "output_bias" those that end in a bias which the unpruned ones do not have, and
"query_groups" the KV head that each query head looks at, where they do not share them evenly. The layers are built by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

transformers' own classes make all layers alike and would fill what is not in the file with random numbers. Hence the
`model_type`s of our own below: whoever does not trust this file gets an error. Attention, caches and generation are
transformers'. Needs only torch and transformers >= 5.15. While transformers loads the config it may log "Reading
global config value for per-layer attribute ..." once an attribute. That is its own check of the config and harmless
here: the layers below are built from their own values.
"""
# mypy: allow-untyped-calls
# ruff: noqa: D101, D102 -- the classes of a family are what their names say

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Cache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.opt import modeling_opt as opt
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.pytorch_utils import Conv1D


def cache_name(module: nn.Module) -> str:
    """What a layer or an attention calls the cache among its arguments: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


class SkippedAttn(nn.Module):
    """Stands where a layer lost its attention: adds nothing, but still counts the tokens.

    transformers asks one layer of the cache, mostly the first, how long the sequence is, so each must know. The zeros
    that are counted have the shape that the layer's config announces, which caches of a fixed size are made from.
    (The name avoids "Attention": transformers does not let the attention implementation be changed where a file
    defines an `*Attention*(nn.Module)` that does not dispatch.)
    """

    def __init__(self, layer_idx: int, heads: int, channels: int) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.channels = layer_idx, heads, channels

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,  # its name until transformers 5.23
        cache: Cache | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        cache = past_key_values if cache is None else cache
        if cache is not None:
            batch, length = hidden_states.shape[:2]
            heads, channels = self.heads, self.channels
            made = getattr(cache.layers[self.layer_idx], "keys", None) if self.layer_idx < len(cache.layers) else None
            if made is not None:  # some releases make caches early (5.15 does) with the unpruned model's heads
                heads, channels = made.shape[1], made.shape[3]
            nothing = hidden_states.new_zeros(batch, heads, length, channels)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class CacheByQuery:
    """What an attention gets for its cache where its query heads do not share the KV heads evenly.

    The cache itself holds each KV head once. What comes out of it has the KV head of every query head, so that any
    attention implementation computes the right thing with one KV head a query head.
    """

    def __init__(self, cache: Cache | None, groups: torch.Tensor) -> None:
        self.cache, self.groups = cache, groups

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *arguments, **named)
        groups = self.groups.to(keys.device)
        return keys.index_select(1, groups), values.index_select(1, groups)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["cache"], name)


class UnevenGroups:
    """Called before an attention's forward: gives it a `CacheByQuery` for its cache."""

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = tuple(groups)

    def __call__(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = cache_name(module)
        return arguments, named | {name: CacheByQuery(named.get(name), torch.tensor(self.groups))}


class SkippedMLP(nn.Module):
    """Stands where a layer lost its MLP: adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class ConfigOfLayer:
    """The config that a layer's modules see: some values are the layer's own, all others are the model's.

    As those are shared, a later change of the attention implementation reaches every layer.
    """

    def __init__(self, config: PreTrainedConfig, **own: Any) -> None:
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying asks for, before there is anything to share
            raise AttributeError(name)
        return getattr(self.__dict__["_shared"], name)


@dataclass(frozen=True)
class Names:
    """What a family calls the modules of its layers: `attention` and `mlp` end in `*_output`; `*_extra` go with them.

    Where there is no `head_dim` in the config, the family's own code takes `hidden_size / heads` for it.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    attention_output: str = "o_proj"
    attention_extra: tuple[str, ...] = ("input_layernorm",)
    mlp: str = "mlp"
    mlp_output: str = "mlp.down_proj"
    mlp_extra: tuple[str, ...] = ("post_attention_layernorm",)
    head_dim: bool = True


LLAMA = Names()
GEMMA = Names(
    attention_extra=("input_layernorm", "post_attention_layernorm"),
    mlp_extra=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
OPT = Names(
    layers="decoder.layers",
    attention_output="out_proj",
    attention_extra=("self_attn_layer_norm",),
    mlp="fc2",
    mlp_output="fc2",
    mlp_extra=("final_layer_norm", "fc1"),
    head_dim=False,
)
GPT2 = Names(
    layers="h",
    attention="attn",
    attention_output="c_proj",
    attention_extra=("ln_1",),
    mlp_output="mlp.c_proj",
    mlp_extra=("ln_2",),
    head_dim=False,
)


class PrunedConfig(PreTrainedConfig):
    """The config of a pruned model; the classes below give it its family's values and a `model_type` of its own."""

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:
        """Always: transformers' own code asks the config for numbers that differ from layer to layer.

        It is not written to config.json, so that a stock config class made to read the file refuses to answer.
        """
        return True

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value: bool) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        """The config as usual, and the number of layers by its usual name, which loading the tokenizer looks for."""
        return super().to_dict() | {"num_hidden_layers": self.num_hidden_layers}


class PrunedMixin(PreTrainedModel):
    """Builds the decoder layers from `config.per_layer_config`; the rest of the model is the family's."""

    layer_class: type[nn.Module]
    names: Names = LLAMA

    def __init__(self, config: PreTrainedConfig) -> None:
        if self.names.head_dim and getattr(config, "head_dim", None) is None:
            raise ValueError("config.head_dim is missing; a pruned layer's head count does not tell it")
        layer_configs = list(config.per_layer_config)
        config.num_hidden_layers = 0  # the family builds all but the layers, which it would make alike
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = len(layer_configs)
        layers = cast(nn.ModuleList, self.base_model.get_submodule(self.names.layers))
        for index, layer_config in enumerate(layer_configs):
            layers.append(self._layer(config, layer_config, index))
        self.post_init()

    def _layer(self, config: PreTrainedConfig, layer_config: PreTrainedConfig, index: int) -> nn.Module:
        names, heads, skip = self.names, layer_config.num_attention_heads, getattr(layer_config, "skip", ())
        if not names.head_dim:
            layer_config.num_attention_heads = config.num_attention_heads
        layer = self.layer_class(layer_config, index)
        if not names.head_dim:
            _resize(layer.get_submodule(names.attention), heads, names.attention_output)
        for module in cast(Any, layer.modules()):
            if hasattr(module, "config"):
                module.config = ConfigOfLayer(config, num_attention_heads=heads)
        if "attention" in skip:
            cached = getattr(layer_config, "num_key_value_heads", None) or heads
            channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            skipped = SkippedAttn(index, cached, channels)
            _replace(layer, dict.fromkeys(names.attention_extra, nn.Identity()) | {names.attention: skipped})
        elif groups := getattr(layer_config, "query_groups", None):
            attention: Any = layer.get_submodule(names.attention)
            attention.num_key_value_groups = 1
            attention.register_forward_pre_hook(UnevenGroups(groups), with_kwargs=True)
        if "mlp" in skip:
            _replace(layer, dict.fromkeys(names.mlp_extra, nn.Identity()) | {names.mlp: SkippedMLP()})
        outputs = {"attention": f"{names.attention}.{names.attention_output}", "mlp": names.mlp_output}
        for kind in getattr(layer_config, "output_bias", ()):
            output: Any = layer.get_submodule(outputs[kind])
            output.bias = nn.Parameter(output.weight.new_zeros(output.out_features))
        return layer


def _replace(layer: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        setattr(layer, name, module)


def _resize(attention: Any, heads: int, output: str) -> None:
    """Make an attention one of `heads` heads, each as large as before."""
    dense, width = attention.num_heads * attention.head_dim, heads * attention.head_dim
    attention.num_heads, attention.split_size = heads, width
    for name, layer in list(attention.named_children()):
        if isinstance(layer, nn.Linear | Conv1D):
            d_in, d_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.T.shape
            d_in, d_out = (width, d_out) if name == output else (d_in, d_out // dense * width)
            conv = isinstance(layer, Conv1D)
            setattr(attention, name, Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out, layer.bias is not None))


class PrunedLlamaConfig(PrunedConfig, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedMixin, llama.LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = llama.LlamaDecoderLayer


class PrunedLlamaForCausalLM(PrunedMixin, llama.LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    layer_class = llama.LlamaDecoderLayer


class PrunedMistralConfig(PrunedConfig, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedMixin, mistral.MistralModel):
    config_class = PrunedMistralConfig
    layer_class = mistral.MistralDecoderLayer


class PrunedMistralForCausalLM(PrunedMixin, mistral.MistralForCausalLM):
    config_class = PrunedMistralConfig
    layer_class = mistral.MistralDecoderLayer


class PrunedQwen2Config(PrunedConfig, Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Model(PrunedMixin, qwen2.Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = qwen2.Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PrunedMixin, qwen2.Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    layer_class = qwen2.Qwen2DecoderLayer


class PrunedQwen3Config(PrunedConfig, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedMixin, qwen3.Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = qwen3.Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedMixin, qwen3.Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    layer_class = qwen3.Qwen3DecoderLayer


class PrunedGemma2Config(PrunedConfig, Gemma2Config):
    model_type = "pruned_gemma2"


class PrunedGemma2Model(PrunedMixin, gemma2.Gemma2Model):
    config_class = PrunedGemma2Config
    layer_class, names = gemma2.Gemma2DecoderLayer, GEMMA


class PrunedGemma2ForCausalLM(PrunedMixin, gemma2.Gemma2ForCausalLM):
    config_class = PrunedGemma2Config
    layer_class, names = gemma2.Gemma2DecoderLayer, GEMMA


class PrunedGemma3Config(PrunedConfig, Gemma3TextConfig):
    model_type = "pruned_gemma3_text"


class PrunedGemma3Model(PrunedMixin, gemma3.Gemma3TextModel):
    config_class = PrunedGemma3Config
    layer_class, names = gemma3.Gemma3DecoderLayer, GEMMA


class PrunedGemma3ForCausalLM(PrunedMixin, gemma3.Gemma3ForCausalLM):
    config_class = PrunedGemma3Config
    layer_class, names = gemma3.Gemma3DecoderLayer, GEMMA


class PrunedPhi3Config(PrunedConfig, Phi3Config):
    model_type = "pruned_phi3"


class PrunedPhi3Model(PrunedMixin, phi3.Phi3Model):
    config_class = PrunedPhi3Config
    layer_class = phi3.Phi3DecoderLayer


class PrunedPhi3ForCausalLM(PrunedMixin, phi3.Phi3ForCausalLM):
    config_class = PrunedPhi3Config
    layer_class = phi3.Phi3DecoderLayer


class PrunedOPTConfig(PrunedConfig, OPTConfig):
    model_type = "pruned_opt"


class PrunedOPTModel(PrunedMixin, opt.OPTModel):
    config_class = PrunedOPTConfig
    layer_class, names = opt.OPTDecoderLayer, OPT


class PrunedOPTForCausalLM(PrunedMixin, opt.OPTForCausalLM):
    config_class = PrunedOPTConfig
    layer_class, names = opt.OPTDecoderLayer, OPT


class PrunedGPT2Config(PrunedConfig, GPT2Config):
    model_type = "pruned_gpt2"


class PrunedGPT2Model(PrunedMixin, gpt2.GPT2Model):
    config_class = PrunedGPT2Config
    layer_class, names = gpt2.GPT2Block, GPT2


class PrunedGPT2ForCausalLM(PrunedMixin, gpt2.GPT2LMHeadModel):
    config_class = PrunedGPT2Config
    layer_class, names = gpt2.GPT2Block, GPT2


# By the `config.model_type` of the dense model.
PRUNED_CLASSES: dict[str, type[PrunedMixin]] = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
    "gemma2": PrunedGemma2ForCausalLM,
    "gemma3_text": PrunedGemma3ForCausalLM,
    "phi3": PrunedPhi3ForCausalLM,
    "opt": PrunedOPTForCausalLM,
    "gpt2": PrunedGPT2ForCausalLM,
}
