"""Model families: where a decoder's blocks, attention, MLP and heads are, and how one sub-block is run alone.

A family is data: one entry of `FAMILIES` says what its modules are called. `sub_blocks(model)` binds an entry to a model and
gives every residual sub-block in the order of the forward pass; everything else in the project works on those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from supernet.errors import InputError

ATTENTION = "attention"
MLP = "mlp"


@dataclass(frozen=True)
class Family:
    """Names of a family's modules. Sub-blocks must be sequential and pre-norm: `x + module(norm(x))`, attention first.

    When a KV group goes, `query` and `key_value` lose output rows and `output` loses input columns; when a neuron goes,
    `mlp_rows` lose a row each and `mlp_column` a column.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    query: str = "q_proj"
    key_value: tuple[str, str] = ("k_proj", "v_proj")
    output: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_rows: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_column: str = "down_proj"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


@dataclass(frozen=True)
class SubBlock:
    """One residual sub-block of a bound model: `x + module(norm(x))`, whose members can be removed.

    Attributes:
        name: Path of the module in the model; also the unit's name.
        kind: `ATTENTION` (members are KV groups: a KV head with its query heads) or `MLP` (members are neurons).
        block: Index of the block it stands in.
        norm_name: Path of the norm before the module, which goes with the last member.
        members: KV groups or neurons of the dense model.
        rows: Linear layer -> output rows per member, for the layers that lose rows.
        column: The linear layer that loses input columns, and where the local pruner works.
        width: Input columns of `column` per member.
    """

    name: str
    kind: str
    block: int
    norm_name: str
    module: nn.Module
    norm: nn.Module
    members: int
    rows: Mapping[str, int]
    column: str
    width: int

    @property
    def projection(self) -> nn.Linear:
        """The linear layer that loses input columns: weight (d_out, members * width)."""
        layer = self.module.get_submodule(self.column)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def member_parameters(self) -> int:
        """Parameters that go with one member: its rows (with their biases) and its columns."""
        count = self.projection.out_features * self.width
        for name, rows in self.rows.items():
            layer = self.module.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            count += rows * (layer.in_features + (layer.bias is not None))
        return count

    def __call__(self, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The sub-block's output with the residual added.

        Args:
            hidden: (batch, tokens, hidden) residual stream before the sub-block.
            context: What the block's attention gets besides (masks, positions), from `entry`.
            weights: Stands in for the module's own parameters of these names (smaller where members are removed).
        """
        arguments = dict(context) if self.kind == ATTENTION else {}
        output = functional_call(self.module, dict(weights or {}), (self.norm(hidden),), arguments)
        change: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden + change

    def projection_inputs(self, hidden: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Inputs X of the projection, (batch * tokens, members * width), without computing the projection itself."""
        seen: list[Tensor] = []

        def record(inputs: Tensor) -> Tensor:
            seen.append(inputs.flatten(0, -2))
            return inputs.new_zeros(*inputs.shape[:-1], self.projection.out_features)

        with _forward_replaced({self.projection: record}):
            self(hidden, context)
        return seen[0]


def family_of(model: PreTrainedModel) -> Family:
    """The family entry of a model; InputError for one that is not known, with how to add it."""
    model_type = str(model.config.model_type)
    if getattr(model.config, "is_heterogeneous", False):
        raise InputError("the model's layers differ in size already (per_layer_config); prune the dense model it was made from")
    if model_type not in FAMILIES:
        raise InputError(
            f"the model's architecture '{model_type}' is not known; known are {', '.join(FAMILIES)}; "
            "a family with the same structure needs one entry in supernet/architecture.py"
        )
    return FAMILIES[model_type]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder blocks."""
    layers = model.get_submodule(family_of(model).blocks)
    assert isinstance(layers, nn.ModuleList)
    return layers


@dataclass(frozen=True)
class Heads:
    """Attention heads of a dense model: `groups` KV heads, each with `queries` query heads, all of `dim` channels."""

    groups: int
    queries: int
    dim: int


def heads_of(config: PreTrainedConfig) -> Heads:
    """The heads that a dense model's config describes."""
    groups, heads = int(config.num_key_value_heads), int(config.num_attention_heads)
    return Heads(groups, heads // groups, int(getattr(config, "head_dim", None) or config.hidden_size // heads))


def sub_blocks(model: PreTrainedModel) -> tuple[SubBlock, ...]:
    """Every sub-block in the order of the forward pass: attention and MLP of block 0, of block 1, ..."""
    family, heads = family_of(model), heads_of(model.config)
    found = []
    for index, block in enumerate(blocks(model)):
        prefix = f"{family.blocks}.{index}"
        found.append(
            SubBlock(
                name=f"{prefix}.{family.attention}",
                kind=ATTENTION,
                block=index,
                norm_name=f"{prefix}.{family.attention_norm}",
                module=block.get_submodule(family.attention),
                norm=block.get_submodule(family.attention_norm),
                members=heads.groups,
                rows={family.query: heads.queries * heads.dim} | dict.fromkeys(family.key_value, heads.dim),
                column=family.output,
                width=heads.queries * heads.dim,
            )
        )
        found.append(
            SubBlock(
                name=f"{prefix}.{family.mlp}",
                kind=MLP,
                block=index,
                norm_name=f"{prefix}.{family.mlp_norm}",
                module=block.get_submodule(family.mlp),
                norm=block.get_submodule(family.mlp_norm),
                members=int(model.config.intermediate_size),
                rows=dict.fromkeys(family.mlp_rows, 1),
                column=family.mlp_column,
                width=1,
            )
        )
    return tuple(found)


def entry(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first block receives, and the context (masks, positions) that each block's attention gets.

    The model's own forward runs with every block replaced by the identity, so that each family's way of making embeddings,
    positions and masks is followed without knowing it.

    Args:
        ids: (batch, tokens) token ids, without padding.

    Returns:
        The residual stream (batch, tokens, hidden) and one dict of keyword arguments a block.
    """
    contexts: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def record(hidden: Tensor, **arguments: Any) -> Tensor:
        first.append(hidden)
        contexts.append({k: v for k, v in arguments.items() if k not in ("past_key_values", "use_cache")})
        return hidden

    with _forward_replaced(dict.fromkeys(blocks(model), record)):
        model.base_model(input_ids=ids, use_cache=False)
    return first[0], contexts


def final_norm_and_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, nn.Linear]:
    """The normalised last hidden states (batch, tokens, hidden), and the layer that turns them into logits."""
    norm, head = model.base_model.norm, model.get_output_embeddings()
    assert isinstance(norm, nn.Module) and isinstance(head, nn.Linear)
    return norm(hidden), head


@contextmanager
def _forward_replaced(replacements: Mapping[nn.Module, Any]) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in replacements}  # hooks of other libraries may sit there
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward  # the class's own forward shows again
            else:
                module.forward = own


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
