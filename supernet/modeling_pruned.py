"""Llama, Mistral, Qwen2 and Qwen3 with layers of different sizes: the modelling code of a pruned checkpoint.

If you found this file next to a checkpoint: attention heads and MLP neurons were removed from the model, and
not equally many from every layer. `per_layer_config` in `config.json` says what is left of each layer (what
it does not mention is as in the unpruned model; "skip" names sub-blocks that are gone altogether), and

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

builds the layers from it. transformers' own classes make all layers alike, hence `trust_remote_code`; the
attention, the caches and generation are theirs. Needs only torch and transformers >= 5.15. While transformers
loads the config it may log "Reading global config value for per-layer attribute ..." once an attribute. That
is its own check of the config and harmless here: the layers below are built from their own values.
"""
# mypy: allow-untyped-calls
# ruff: noqa: D101, D102 -- the classes of a family are what their names say

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3


class SkippedAttn(nn.Module):
    """Stands where a layer lost its attention: adds nothing, but still counts the tokens.

    transformers asks one layer of the cache, mostly the first, how long the sequence is, so each must know.
    The count takes two numbers a token. (The name avoids "Attention": transformers does not let the attention
    implementation be changed where a file defines an `*Attention*(nn.Module)` that does not dispatch.)
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **_: object
    ) -> tuple[torch.Tensor, None]:
        if past_key_values is not None:
            batch, length = hidden_states.shape[:2]
            count = hidden_states.new_zeros(batch, 1, length, 1)  # (batch, heads, tokens, channels)
            past_key_values.update(count, count, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Stands where a layer lost its MLP: adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class PrunedMixin(PreTrainedModel):
    """Builds the decoder layers from `config.per_layer_config`; the rest of the model is the family's."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        if getattr(config, "head_dim", None) is None:
            raise ValueError("config.head_dim is missing; a pruned layer's head count does not tell it")
        layer_configs = list(config.per_layer_config)
        config.num_hidden_layers = 0  # the family builds all but the layers, which it would make alike
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = len(layer_configs)
        layers = cast(nn.ModuleList, self.base_model.layers)
        for index, layer_config in enumerate(layer_configs):
            layer: Any = self.layer_class(layer_config, index)
            # Shared, so that a later change of the attention implementation reaches every layer.
            layer.self_attn.config = layer.mlp.config = config
            skip = getattr(layer_config, "skip", ())
            if "attention" in skip:
                layer.input_layernorm, layer.self_attn = nn.Identity(), SkippedAttn(index)
            if "mlp" in skip:
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), SkippedMLP()
            layers.append(layer)
        self.post_init()


class PrunedLlamaModel(PrunedMixin, llama.LlamaModel):
    layer_class = llama.LlamaDecoderLayer


class PrunedLlamaForCausalLM(PrunedMixin, llama.LlamaForCausalLM):
    layer_class = llama.LlamaDecoderLayer


class PrunedMistralModel(PrunedMixin, mistral.MistralModel):
    layer_class = mistral.MistralDecoderLayer


class PrunedMistralForCausalLM(PrunedMixin, mistral.MistralForCausalLM):
    layer_class = mistral.MistralDecoderLayer


class PrunedQwen2Model(PrunedMixin, qwen2.Qwen2Model):
    layer_class = qwen2.Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PrunedMixin, qwen2.Qwen2ForCausalLM):
    layer_class = qwen2.Qwen2DecoderLayer


class PrunedQwen3Model(PrunedMixin, qwen3.Qwen3Model):
    layer_class = qwen3.Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedMixin, qwen3.Qwen3ForCausalLM):
    layer_class = qwen3.Qwen3DecoderLayer


# By `config.model_type`.
PRUNED_CLASSES: dict[str, type[PrunedMixin]] = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
}
