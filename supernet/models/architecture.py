"""A model's sub-blocks: where a decoder's blocks, attention, MLP and heads are, and how one sub-block is run alone.

What a family's modules are called is data (`supernet.models.families`). `sub_blocks(model)` binds it to a model and
gives every residual sub-block in the order of the forward pass; everything else in the project works on those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from supernet.models.families import Family, Heads, family_of, heads_of
from supernet.models.layers import Layer, Receive, first_argument, inputs_of, layer_of, with_stacks
from supernet.space import ATTENTION, MIXER, MLP


@dataclass(frozen=True)
class Rows:
    """Output rows of a layer that go with members: member i has `count` rows from `offset + i * count` on."""

    layer: str
    offset: int
    count: int


@dataclass(frozen=True)
class Removable:
    """The members that can be taken out of a sub-block one by one.

    They are KV groups with their query heads, single query heads, or neurons.

    Attributes:
        members: How many the dense model has.
        rows: Output rows that go with a member.
        width: Input columns that go with a member, of the layer that ends the sub-block.
        slices: Whether the module's own code runs without the rows and columns; if not, columns are set to zero
            instead.
    """

    members: int
    rows: tuple[Rows, ...]
    width: int
    slices: bool


@dataclass(frozen=True)
class SubBlock:
    """One residual sub-block of a bound model: `x + post_norm(module(norm(x)))`.

    Attributes:
        name: Path of the module in the model (`<block>.mlp` where an MLP is no module of its own), which is also the
            name of the unit.
        kind: `ATTENTION`, `MLP` or `MIXER`.
        block: Index of the block that it stands in.
        block_name: Path of that block.
        prefix: Path of the module's layers in the model's state (the block's, where an MLP is no module of its own).
        norm_name: Path of the norm before the module.
        post_norm_name: Path of the norm behind the module, if there is one.
        stages: Linear layers that share their inputs, stage by stage in the order of computation, by name within the
            module.
        groups: The members that can be taken out; None for mixers.
        query_heads: Single query heads as members, with rows of the queries alone (Týr-the-Pruner); None for all but
            attention.
        wide_residual: The residual stream is float32 whatever the weights are.
        receive: What a layer gets as inputs, from the call of the module that holds it: its argument, for a linear
            module. A sub-block with stacked experts has one that knows how tokens are routed
            (`supernet.models.layers.routed_tokens`).
    """

    name: str
    kind: str
    block: int
    block_name: str
    prefix: str
    norm_name: str
    post_norm_name: str | None
    module: nn.Module
    norm: nn.Module
    post_norm: nn.Module | None
    stages: tuple[tuple[str, ...], ...]
    groups: Removable | None = None
    query_heads: Removable | None = None
    wide_residual: bool = False
    receive: Receive = first_argument

    @property
    def column(self) -> str:
        """The linear layer that ends the module, and that loses input columns."""
        return self.stages[-1][0]

    def layer(self, name: str) -> Layer:
        """The linear layer of this name, one of those in `stages`."""
        return layer_of(self.module, name)

    def weight(self, layer: str) -> Tensor:
        """The weight of a linear layer as a view, (d_out, d_in)."""
        return self.layer(layer).weight

    def bias(self, layer: str) -> Tensor | None:
        """The bias of a linear layer, (d_out,); None where it has none."""
        return self.layer(layer).bias

    def replaced(self, layer: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The module's parameters that stand for a layer of another weight (d_out, d_in), and bias if one is given.

        Those of several layers can be united and given to a call.
        """
        return self.layer(layer).replaced(weight, bias)

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that stand for the module's own, by their paths in the model's state."""
        whole = with_stacks(self.module, parameters)
        return {self.state_name(name): tensor for name, tensor in whole.items()}

    def state_name(self, parameter: str) -> str:
        """Path in the model's state of a parameter of the module."""
        return f"{self.prefix}.{parameter}"

    @property
    def own_state(self) -> tuple[str, ...]:
        """Paths in the model's state of everything that goes with the sub-block: of its module, and of its norms."""
        names = [self.state_name(name) for name in self.module.state_dict()]
        for path, norm in ((self.norm_name, self.norm), (self.post_norm_name, self.post_norm)):
            names += [f"{path}.{name}" for name in norm.state_dict()] if norm is not None else []
        return tuple(names)

    @property
    def parameters(self) -> int:
        """How many parameters go with the whole sub-block. Norms, like embeddings, are not counted."""
        return sum(parameter.numel() for name, parameter in self.module.named_parameters() if "norm" not in name)

    @property
    def member_parameters(self) -> int:
        """How many parameters go with one member: its rows with their biases, and its columns."""
        assert self.groups is not None
        count = self.weight(self.column).shape[0] * self.groups.width
        for rows in self.groups.rows:
            count += rows.count * (self.weight(rows.layer).shape[1] + (self.bias(rows.layer) is not None))
        return count

    def __call__(
        self, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The sub-block's output with the residual added.

        Args:
            hidden: (batch, tokens, hidden) residual stream before the sub-block.
            context: What else the block's attention gets (masks, positions), from `supernet.models.forward.entry`.
            weights: Parameters that stand for the module's own, by name, as `replaced` gives them; they are smaller
                where members are removed.
        """
        change = self.change(hidden, context, weights)
        return (hidden.float() if self.wide_residual else hidden) + change

    def change(self, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the sub-block adds to the residual stream, (batch, tokens, hidden); arguments as for a call."""
        arguments = dict(context) if self.kind == ATTENTION else {}
        inputs = self.norm(hidden.to(next(self.norm.parameters()).dtype) if self.wide_residual else hidden)
        output = functional_call(self.module, with_stacks(self.module, weights or {}), (inputs,), arguments)
        change: Tensor = output[0] if isinstance(output, tuple) else output
        return change if self.post_norm is None else self.post_norm(change)

    @property
    def ends_alone(self) -> bool:
        """Whether one linear layer gives all that the module gives: experts' outputs are weighed and added up."""
        return len(self.stages[-1]) == 1 and self.layer(self.column).index is None

    def ended(self, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What a sub-block that `ends_alone` adds to the stream, from the inputs (batch, tokens, d_in) of that layer.

        The module's parameters `weights` stand for its own, as in a call; only those of the last layer matter here.
        """
        layer = f"{self.column}."
        own = {name.removeprefix(layer): tensor for name, tensor in weights.items() if name.startswith(layer)}
        change: Tensor = functional_call(self.module.get_submodule(self.column), own, (inputs,))
        return change if self.post_norm is None else self.post_norm(change)

    def inputs(
        self, layer: str, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Inputs of a linear layer; nothing behind it is computed. Arguments are those of a call.

        Returns:
            (batch * tokens, d_in), or a row for each token that is sent to the layer's expert.
        """
        return inputs_of(self.layer(layer), lambda: self.change(hidden, context, weights), self.receive)


class _MlpOfBlock(nn.Module):
    """An MLP whose layers lie in the block itself, as a module."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        for name in (*family.mlp_rows, family.mlp_column):
            self.add_module(name, block.get_submodule(name))
        self.first, self.last = family.mlp_rows[0], family.mlp_column
        self.activation = getattr(block, str(family.mlp_activation))

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.get_submodule(self.last)(self.activation(self.get_submodule(self.first)(hidden)))
        return output


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder blocks."""
    layers = model.get_submodule(family_of(model).blocks)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sub_blocks(model: PreTrainedModel) -> tuple[SubBlock, ...]:
    """Every sub-block in the order of the forward pass.

    That is attention, mixer and MLP of block 0, then of block 1, ..., as far as a block has them.
    """
    family = family_of(model)
    found: list[SubBlock] = []
    for index, block in enumerate(blocks(model)):
        found += _sub_blocks(family.of_block(model.config, index), model.config, block, index)
    return tuple(found)


def _sub_blocks(family: Family, config: PreTrainedConfig, block: nn.Module, index: int) -> Iterator[SubBlock]:
    """The sub-blocks of one block; `family` is what `Family.of_block` says of it."""
    name = f"{family.blocks}.{index}"
    if family.attention:
        yield _attention(family, family.heads or heads_of(config), block, index, name)
    if family.mixer:
        yield _mixer(family, config, block, index, name)
    if family.mlp_rows:
        yield _mlp(family, block, index, name)


def by_query_heads(parts: Sequence[SubBlock]) -> tuple[SubBlock, ...]:
    """The sub-blocks with single query heads as members of the attention instead of KV groups."""
    return tuple(replace(part, groups=part.query_heads) if part.query_heads else part for part in parts)


def _attention(family: Family, heads: Heads, block: nn.Module, index: int, name: str) -> SubBlock:
    query, key, value = family.attention_rows
    queries = heads.queries * heads.dim
    counts = ((query, queries), (key, heads.dim), (value, heads.dim))
    rows = tuple(_sections([(layer, count, heads.groups) for layer, count in counts]))
    return SubBlock(
        name=f"{name}.{family.attention}",
        kind=ATTENTION,
        block=index,
        block_name=name,
        prefix=f"{name}.{family.attention}",
        module=block.get_submodule(family.attention),
        stages=(tuple(dict.fromkeys(family.attention_rows)), (family.attention_column,)),
        groups=Removable(heads.groups, rows, queries, ATTENTION in family.slices),
        query_heads=Removable(heads.groups * heads.queries, (Rows(query, 0, heads.dim),), heads.dim, False),
        **_norms(block, name, family.attention_norm, family.attention_post_norm),
    )


def _mlp(family: Family, block: nn.Module, index: int, name: str) -> SubBlock:
    module = block.get_submodule(family.mlp) if family.mlp else _MlpOfBlock(block, family)
    part = SubBlock(
        name=f"{name}.{family.mlp or MLP}",
        kind=MLP,
        block=index,
        block_name=name,
        prefix=f"{name}.{family.mlp}" if family.mlp else name,
        module=module,
        stages=(tuple(dict.fromkeys(family.mlp_rows)), (family.mlp_column,)),
        **_norms(block, name, family.mlp_norm, family.mlp_post_norm),
    )
    neurons = part.weight(family.mlp_column).shape[1]
    rows = tuple(_sections([(layer, 1, neurons) for layer in family.mlp_rows]))
    return replace(part, groups=Removable(neurons, rows, 1, MLP in family.slices))


def _mixer(family: Family, config: PreTrainedConfig, block: nn.Module, index: int, name: str) -> SubBlock:
    return SubBlock(
        name=f"{name}.{family.mixer}",
        kind=MIXER,
        block=index,
        block_name=name,
        prefix=f"{name}.{family.mixer}",
        module=block.get_submodule(family.mixer),
        stages=family.mixer_stages,
        wide_residual=bool(getattr(config, "residual_in_fp32", False)),
        **_norms(block, name, family.mixer_norm, None),
    )


def _sections(layers: Sequence[tuple[str, int, int]]) -> Iterator[Rows]:
    """Rows from triples (layer, rows per member, members): a layer that comes again goes on where it ended before."""
    ends: dict[str, int] = {}
    for layer, count, members in layers:
        yield Rows(layer, ends.get(layer, 0), count)
        ends[layer] = ends.get(layer, 0) + count * members


def _norms(block: nn.Module, name: str, norm: str, post_norm: str | None) -> dict[str, Any]:
    return {
        "norm": block.get_submodule(norm),
        "norm_name": f"{name}.{norm}",
        "post_norm": block.get_submodule(post_norm) if post_norm else None,
        "post_norm_name": f"{name}.{post_norm}" if post_norm else None,
    }


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def nonzero_count(model: nn.Module) -> int:
    """How many parameters of a model are not zero; tied ones count once."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())
