"""An allocation put into a model, in memory: layers are really smaller, in the class that an export will have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from supernet.candidates import Members
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.families import Family, family_of, heads_of
from supernet.models.modeling_pruned import PRUNED_CLASSES
from supernet.models.placement import Place, cleared, places
from supernet.space import ATTENTION, HEADS
from supernet.store import Supernet

# Entries of a dense model's config that name code of its makers: none of it lies in our folder, nor was it run.
FOREIGN = ("auto_map", "custom_pipelines", "custom_generate")


@dataclass(frozen=True)
class PrunedSubBlock:
    """What an allocation makes of a sub-block.

    Attributes:
        part: The sub-block of the dense model.
        members: The members that are left, where layers become smaller by some; else None.
        tensors: The module's parameters that differ from the dense ones, by name; None where the sub-block is absent.
        heads: Whether the members are single query heads.
    """

    part: SubBlock
    members: tuple[int, ...] | None
    tensors: dict[str, Tensor] | None
    heads: bool = False


@dataclass(frozen=True)
class Shape:
    """What the pruned model is built from.

    Attributes:
        config: A config of the family's own class; where that cannot hold the model, of one of the classes in
            `supernet.models.modeling_pruned`, with `per_layer_config`.
        blocks: The blocks of the dense model that are left, in order.
    """

    config: PreTrainedConfig
    blocks: tuple[int, ...]


def check_family(model: PreTrainedModel, structured: bool) -> None:
    """Raise InputError if the model's family is not known, or cannot have layers of different sizes as is asked for.

    Args:
        model: The dense model.
        structured: Whether units are members (KV groups, query heads, neurons) or single sub-blocks, which leaves
            layers of different sizes; weights, bits and blocks do not.
    """
    family = family_of(model)
    if structured and not family.mixer:  # a mixer is present or not, and so is its block
        _pruned_class(str(model.config.model_type))


def slices_query_heads(family: Family) -> bool:
    """Whether single query heads are really taken out of this family's models; else their weights are set to zero."""
    return family.free_heads and len(set(family.attention_rows)) == len(family.attention_rows)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head and the embeddings are one tensor in memory. A config may say so though they are two."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    return head is not None and bool(head.weight.data_ptr() == embeddings.weight.data_ptr())


def _pruned_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a family's models with layers of different sizes; InputError where there is none."""
    if model_type not in PRUNED_CLASSES:
        raise InputError(
            f"the family '{model_type}' has an entry in supernet/models/families.py but no classes in "
            "supernet/models/modeling_pruned.py, which layers of different sizes need; add its two, or prune weights "
            "(prune=sparsegpt), bits (prune=gptq) or whole blocks"
        )
    return PRUNED_CLASSES[model_type]


@torch.no_grad()
def assemble(model: PreTrainedModel, supernet: Supernet, allocation: Sequence[int]) -> PreTrainedModel:
    """Make the pruned model of an allocation. What is not pruned shares its memory with the dense model.

    Where the family's own class can hold the result (all its layers are alike, whatever their weights), it is of that
    class, and blocks that are absent as a whole are really left out; else they are layers that skip both of their
    sub-blocks.
    """
    family = family_of(model)
    changes = [
        _change(family.of_block(model.config, place.part.block), place, supernet, allocation)
        for place in places(model, supernet.space)
    ]
    shape = pruned_shape(model.config, family, changes)
    shape.config.tie_word_embeddings = is_tied(model)
    pruned_class: type[PreTrainedModel] = type(model)
    if shape.config.is_heterogeneous:
        pruned_class = _pruned_class(str(model.config.model_type))
    with torch.device("meta"):
        pruned = pruned_class(shape.config)
    pruned.load_state_dict(_numbered(_state(model, changes), family.blocks, shape.blocks), assign=True)
    pruned.tie_weights()
    _fill_buffers(pruned, _numbered(dict(model.named_buffers()), family.blocks, shape.blocks))
    pruned.generation_config = model.generation_config
    pruned.eval().requires_grad_(False)
    return pruned


def _change(family: Family, place: Place, supernet: Supernet, allocation: Sequence[int]) -> PrunedSubBlock:
    """What the allocation makes of one sub-block; layers get smaller where the family's classes allow it."""
    part = place.part
    heads = any(supernet.space.units[unit].kind == HEADS for unit, _ in place.units)
    if part.groups is not None and (not heads or slices_query_heads(family)):
        part = replace(part, groups=replace(part.groups, slices=True))
    device = part.weight(part.column).device
    levels = [(unit, allocation[unit]) for unit, _ in place.units]
    candidates = [supernet.candidate(unit, level, device) if level else None for unit, level in levels]
    members = next((tuple(c.kept.tolist()) for c in candidates if isinstance(c, Members)), None)
    tensors = replace(place, part=part).weights(candidates)
    if members and part.groups is not None and not part.groups.slices:
        tensors, members = tensors and tensors | cleared(part, members), None
    return PrunedSubBlock(part, members or None, tensors, heads)


def pruned_shape(config: PreTrainedConfig, family: Family, changes: Sequence[PrunedSubBlock]) -> Shape:
    """What to build: with a plain config where all layers that are left are alike, else with `per_layer_config`.

    Args:
        config: The config of the dense model.
        family: Its family.
        changes: What becomes of each of its sub-blocks.
    """
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_hidden_layers)]
    for change in changes:
        layer = layers[change.part.block]
        for key, value in _overrides(config, family.of_block(config, change.part.block), change).items():
            layer[key] = layer.get(key, []) + value if isinstance(value, list) else value
    present = {change.part.block for change in changes if change.tensors is not None}
    blocks = tuple(block for block in range(len(layers)) if block in present)
    values = {name: value for name, value in config.to_dict().items() if name not in FOREIGN}
    if family.free_heads and not family.mixer:
        values["head_dim"] = heads_of(config).dim
    if _stock_holds(config, family, layers, blocks):
        values |= layers[blocks[0]] if blocks else {}
        if isinstance(values.get("layer_types"), list):
            values["layer_types"] = [values["layer_types"][block] for block in blocks]
        return Shape(type(config)(**(values | {_key(config, "num_hidden_layers"): len(blocks)})), blocks)
    for name in ("output_bias", "query_groups"):
        if any(name in layer for layer in layers):
            values[name] = []  # of the layers that do not say
    values |= {"head_dim": heads_of(config).dim, "per_layer_config": dict(enumerate(layers))}
    del values["model_type"]  # the class has its own
    config_class: Any = _pruned_class(str(config.model_type)).config_class
    return Shape(config_class(**values), tuple(range(len(layers))))


def _overrides(config: PreTrainedConfig, family: Family, change: PrunedSubBlock) -> dict[str, Any]:
    """Entries of a layer's config that differ by what becomes of a sub-block: numbers, or lists of sub-blocks' kinds.

    `family` is what `Family.of_block` says of the layer.
    """
    part, heads = change.part, _key(config, "num_attention_heads")
    grouped = hasattr(config, "num_key_value_heads")
    if change.tensors is None:
        # One head and one neuron stand for none: so the zeros that count tokens are few (`SkippedAttn`), and numbers
        # that differ from layer to layer make transformers' own config classes refuse to answer.
        placeholder = {family.config_neurons: 1}
        if part.kind == ATTENTION:
            placeholder = {heads: 1} | ({"num_key_value_heads": 1} if grouped else {})
        return {"skip": [part.kind]} | placeholder
    found: dict[str, Any] = {}
    if change.members is not None and change.heads:
        dense = family.heads or heads_of(config)
        found[heads] = len(change.members)
        of_heads = [member // dense.queries for member in change.members]
        shared_evenly = len({of_heads.count(group) for group in range(dense.groups)}) == 1
        if not shared_evenly:
            found["query_groups"] = of_heads
    elif change.members is not None and part.kind == ATTENTION:
        found[heads] = len(change.members) * (family.heads or heads_of(config)).queries
        if grouped:
            found["num_key_value_heads"] = len(change.members)
    elif change.members is not None:
        found[family.config_neurons] = len(change.members)
    if f"{part.column}.bias" in change.tensors and part.bias(part.column) is None:
        found["output_bias"] = [part.kind]
    return found


def _key(config: PreTrainedConfig, name: str) -> str:
    return str(config.attribute_map.get(name, name))


def _stock_holds(
    config: PreTrainedConfig, family: Family, layers: Sequence[Mapping[str, Any]], blocks: Sequence[int]
) -> bool:
    """Whether the family's own class can hold the blocks that are left."""
    if not blocks:
        return bool(family.mixer)  # without attention no layer counts the tokens for the positions
    left = [layers[block] for block in blocks]
    if any(layer != left[0] for layer in left) or {"skip", "output_bias", "query_groups"} & left[0].keys():
        return False
    if len(blocks) < len(layers) and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return False  # layers must keep their numbers
    heads = left[0].get(_key(config, "num_attention_heads"))
    rotary = getattr(config, "rope_parameters", None) or {}
    # Stock configs refuse head counts that do not divide the hidden size, and count LongRoPE's factors by hidden_size /
    # heads.
    return heads is None or (family.free_heads and config.hidden_size % heads == 0 and "short_factor" not in rotary)


def _state(model: PreTrainedModel, changes: Sequence[PrunedSubBlock]) -> dict[str, Tensor]:
    """The state of the pruned model: the dense model's, with what differs and without what is gone."""
    state = dict(model.state_dict())
    for change in changes:
        if change.tensors is None:
            for name in change.part.own_state:
                del state[name]
        else:
            state |= change.part.state(change.tensors)
    return state


def _numbered(tensors: Mapping[str, Tensor], path: str, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a model, by name, with only these blocks at `path`, which are numbered 0, 1, ... anew."""
    numbers = {str(block): str(index) for index, block in enumerate(blocks)}
    found = {}
    for name, tensor in tensors.items():
        number, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}."):
            found[name] = tensor
        elif number in numbers:
            found[f"{path}.{numbers[number]}{dot}{rest}"] = tensor
    return found


def _fill_buffers(pruned: PreTrainedModel, dense: Mapping[str, Tensor]) -> None:
    """Copy buffers that are in no state (rotary frequencies, the scale of embeddings) from the dense model."""
    for path, module in pruned.named_modules():
        for name, buffer in list(module.named_buffers(path, recurse=False)):
            if buffer.is_meta:
                # Frequencies that adapt to the length of a text may have done so; as they were at first they are kept
                # beside.
                first = dense.get(name.replace("inv_freq", "original_inv_freq"), dense[name])
                module.register_buffer(name.rpartition(".")[2], first.clone(), persistent=False)
