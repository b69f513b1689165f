"""An allocation put into a model, in memory: really smaller layers, in the class that the exported checkpoint will use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from supernet.architecture import ATTENTION, SubBlock, heads_of, sub_blocks
from supernet.encoding import sliced
from supernet.modeling_pruned import PRUNED_CLASSES
from supernet.store import Supernet


@torch.no_grad()
def assemble(model: PreTrainedModel, supernet: Supernet, allocation: Sequence[int]) -> PreTrainedModel:
    """The pruned model of an allocation; what is not pruned shares its memory with the dense model.

    Where all layers come out alike and the family's own class can hold them, the result is of that class.
    """
    parts = sub_blocks(model)
    config = pruned_config(model.config, parts, supernet.space.kept(allocation))
    pruned_class: type[PreTrainedModel] = PRUNED_CLASSES[config.model_type] if config.is_heterogeneous else type(model)
    with torch.device("meta"):
        pruned = pruned_class(config)
    pruned.load_state_dict(_state(model, parts, supernet, allocation), assign=True)
    pruned.tie_weights()
    base = cast(Any, pruned.base_model)
    base.rotary_emb = type(base.rotary_emb)(config).to(model.device)  # its buffers are not in the state
    pruned.generation_config = model.generation_config
    pruned.eval().requires_grad_(False)
    return pruned


def _state(model: PreTrainedModel, parts: Sequence[SubBlock], supernet: Supernet, allocation: Sequence[int]) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for index, (part, level) in enumerate(zip(parts, allocation, strict=True)):
        if level == 0:
            continue
        candidate = supernet.candidate(index, level, part.projection.weight.device)
        if len(candidate.kept):
            state |= {f"{part.name}.{name}": tensor for name, tensor in sliced(part, candidate).items()}
        else:
            gone = (f"{part.name}.", f"{part.norm_name}.")
            state = {name: tensor for name, tensor in state.items() if not name.startswith(gone)}
    return state


def pruned_config(config: PreTrainedConfig, parts: Sequence[SubBlock], kept: Mapping[str, int]) -> PreTrainedConfig:
    """The config of the pruned model: a plain one where all layers are alike, else with `per_layer_config`.

    Args:
        config: Of the dense model.
        parts: Its sub-blocks.
        kept: Members kept per sub-block name.
    """
    heads = heads_of(config)
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_hidden_layers)]
    for part in parts:
        count, layer = kept[part.name], layers[part.block]
        if count == 0:
            layer.setdefault("skip", []).append(part.kind)
        elif part.kind == ATTENTION:
            layer |= {"num_key_value_heads": count, "num_attention_heads": count * heads.queries}
        else:
            layer["intermediate_size"] = count
    values = config.to_dict() | {"head_dim": heads.dim}
    alike = all(layer == layers[0] for layer in layers) and "skip" not in layers[0]
    if alike and config.hidden_size % layers[0]["num_attention_heads"] == 0:  # else the stock config refuses the head count
        return type(config)(**(values | layers[0]))
    per_layer = {"per_layer_config": dict(enumerate(layers)), "allow_global_per_layer_attribute_access": True}
    return type(config)(**(values | per_layer))
