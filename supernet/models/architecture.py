"""A model's sub-blocks: where a decoder's blocks, attention, MLP and heads are, and how one sub-block is run alone.

What a family's modules are called is data (`supernet.models.families`). `sub_blocks(model)` binds it to a model and
gives every residual sub-block in the order of the forward pass; everything else in the project works on those.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from supernet.errors import InputError
from supernet.models.families import Family, family_of
from supernet.space import ATTENTION, MIXER, MLP
from supernet.system.memory import is_out_of_memory

# arguments of a block that a pass without a cache does not need
CACHE = ("past_key_values", "use_cache", "cache_params")


@dataclass(frozen=True)
class Rows:
    """Output rows of a layer that go with members: member i has rows `offset + i * count` up to `offset + (i + 1) *
    count`.
    """

    layer: str
    offset: int
    count: int


@dataclass(frozen=True)
class Removable:
    """Members that can be taken out of a sub-block one by one: KV groups with their query heads, query heads, or
    neurons.

    Attributes:
        members: Of the dense model.
        rows: Output rows that go with a member.
        width: Input columns of the sub-block's `column` per member.
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
        name: Also the unit's name: path of the module in the model (`<block>.mlp` where an MLP is no module of its
            own).
        kind: `ATTENTION`, `MLP` or `MIXER`.
        block: Index of the block it stands in.
        block_name: Path of that block.
        prefix: Path of the module's layers in the model's state (the block's, where an MLP is no module of its own).
        norm_name: Path of the norm before the module.
        post_norm_name: Path of the norm behind the module, if there is one.
        stages: Linear layers that share their inputs, stage by stage in the order of computation, by name within the
            module.
        groups: What can be removed from it; None for mixers.
        query_heads: The same by single query heads, with rows of the queries alone (Týr-the-Pruner); None but for
            attention.
        wide_residual: The residual stream is float32 whatever the weights are.
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

    @property
    def column(self) -> str:
        """The linear layer that ends the module, and that loses input columns."""
        return self.stages[-1][0]

    def weight(self, layer: str) -> Tensor:
        """(d_out, d_in), a view."""
        module = self.module.get_submodule(layer)
        assert isinstance(module, nn.Linear | Conv1D)
        return module.weight.T if isinstance(module, Conv1D) else module.weight

    def bias(self, layer: str) -> Tensor | None:
        """(d_out,), or None."""
        module = self.module.get_submodule(layer)
        assert isinstance(module, nn.Linear | Conv1D)
        return module.bias

    def replaced(self, layer: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The module's parameters that stand for a layer of another weight (d_out, d_in), and bias if one is given."""
        if isinstance(self.module.get_submodule(layer), Conv1D):
            weight = weight.T.contiguous()
        return {f"{layer}.weight": weight} | ({} if bias is None else {f"{layer}.bias": bias})

    def state_name(self, parameter: str) -> str:
        """Path in the model's state of a parameter of the module."""
        return f"{self.prefix}.{parameter}"

    @property
    def own_state(self) -> tuple[str, ...]:
        """Paths in the model's state of all that goes with the whole sub-block: the module's and its norms'."""
        names = [self.state_name(name) for name in self.module.state_dict()]
        for path, norm in ((self.norm_name, self.norm), (self.post_norm_name, self.post_norm)):
            names += [f"{path}.{name}" for name in norm.state_dict()] if norm is not None else []
        return tuple(names)

    @property
    def parameters(self) -> int:
        """Parameters that go with the whole sub-block: all of the module's but norms, which, like embeddings, are not
        counted.
        """
        return sum(parameter.numel() for name, parameter in self.module.named_parameters() if "norm" not in name)

    @property
    def member_parameters(self) -> int:
        """Parameters that go with one member: its rows (with their biases) and its columns."""
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
            context: What the block's attention gets besides (masks, positions), from `entry`.
            weights: Stands in for the module's own parameters of these names (smaller where members are removed).
        """
        change = self.change(hidden, context, weights)
        return (hidden.float() if self.wide_residual else hidden) + change

    def change(self, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the sub-block adds to the residual stream, (batch, tokens, hidden); arguments as for a call."""
        arguments = dict(context) if self.kind == ATTENTION else {}
        inputs = self.norm(hidden.to(next(self.norm.parameters()).dtype) if self.wide_residual else hidden)
        output = functional_call(self.module, dict(weights or {}), (inputs,), arguments)
        change: Tensor = output[0] if isinstance(output, tuple) else output
        return change if self.post_norm is None else self.post_norm(change)

    def inputs(
        self, layer: str, hidden: Tensor, context: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Inputs of a linear layer, (batch * tokens, d_in); nothing behind it is computed."""
        seen: list[Tensor] = []

        def record(inputs: Tensor) -> Tensor:
            seen.append(inputs.flatten(0, -2))
            raise _SeenError

        with _forward_replaced({self.module.get_submodule(layer): record}):
            try:
                self.change(hidden, context, weights)
            except _SeenError:
                pass
        return seen[0]


class _SeenError(Exception):
    """Ends a forward pass where its result is known."""


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


@dataclass(frozen=True)
class Heads:
    """Attention heads of a dense model: `groups` KV heads, each with `queries` query heads, all of `dim` channels."""

    groups: int
    queries: int
    dim: int


def heads_of(config: PreTrainedConfig) -> Heads:
    """The heads that a dense model's config describes."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return Heads(groups, heads // groups, int(getattr(config, "head_dim", None) or config.hidden_size // heads))


def sub_blocks(model: PreTrainedModel) -> tuple[SubBlock, ...]:
    """Every sub-block in the order of the forward pass: attention and MLP of block 0, of block 1, ..., or the
    mixers.
    """
    family = family_of(model)
    found: list[SubBlock] = []
    for index, block in enumerate(blocks(model)):
        name = f"{family.blocks}.{index}"
        if family.mixer:
            found.append(_mixer(family, model.config, block, index, name))
        else:
            found += [_attention(family, heads_of(model.config), block, index, name), _mlp(family, block, index, name)]
    return tuple(found)


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
        wide_residual=bool(config.residual_in_fp32),
        **_norms(block, name, family.mixer_norm, None),
    )


def _sections(layers: Sequence[tuple[str, int, int]]) -> Iterator[Rows]:
    """Rows of (layer, rows a member, members): a layer that comes again goes on where it ended."""
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


def entry(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first block receives, and the context (masks, positions) that each block's attention gets.

    The model's own forward runs with every block replaced by the identity, so that each family's way of making
    embeddings, positions and masks is followed without knowing it.

    Args:
        ids: (batch, tokens) token ids, without padding.

    Returns:
        The residual stream (batch, tokens, hidden) and one dict of keyword arguments a block.
    """
    contexts: list[dict[str, Any]] = []
    first: list[Tensor] = []
    layers = blocks(model)
    names = tuple(inspect.signature(type(layers[0]).forward).parameters)[2:]  # without itself and the hidden states

    def record(hidden: Tensor, *unnamed: Any, **named: Any) -> Tensor:
        first.append(hidden)
        arguments = dict(zip(names, unnamed, strict=False)) | named
        contexts.append({k: v for k, v in arguments.items() if k not in CACHE})
        return hidden

    with _forward_replaced(dict.fromkeys(layers, record)):
        model.base_model(input_ids=ids, use_cache=False)
    return first[0], contexts


@dataclass(frozen=True)
class Head:
    """What turns normalised last hidden states into logits: a linear layer, and `cap * tanh(logits / cap)` where `cap`
    is set.
    """

    linear: nn.Linear
    cap: float | None


def final_norm_and_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Head]:
    """The normalised last hidden states (batch, tokens, hidden) in the dtype of the head, and what turns them into
    logits.
    """
    norm, head = model.get_submodule(family_of(model).final_norm), head_of(model)
    return norm(hidden).to(head.linear.weight.dtype), head


def head_of(model: PreTrainedModel) -> Head:
    """What turns normalised last hidden states into logits."""
    linear = model.get_output_embeddings()
    assert isinstance(linear, nn.Linear)
    return Head(linear, getattr(model.config, "final_logit_softcapping", None))


@torch.no_grad()
def check_walk(model: PreTrainedModel) -> None:
    """InputError if the sub-blocks of a few tokens, one after the other, and the head are not what the model itself
    computes.

    So an entry in `FAMILIES` that does not fit, or a model that does more (scales what a sub-block adds, or the
    logits), is told before any work. Differences may be half of the dtype's digits; output that is not finite is told
    later, with its unit.
    """
    family_of(model)  # before anything is asked of a model that may be of any kind
    ids = (torch.arange(8, device=model.device) % int(model.config.vocab_size)).unsqueeze(0)
    try:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        hidden, contexts = entry(model, ids)
        for part in sub_blocks(model):
            hidden = part(hidden, contexts[part.block])
        normed, head = final_norm_and_head(model, hidden)
        walked = head.linear(normed)
    except InputError:
        raise
    except Exception as error:  # whatever a model's own code comes to where sizes or modules are not what it expects
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _does_not_fit(model, f"modules are called or made differently ({said})") from error
    walked = walked if head.cap is None else head.cap * torch.tanh(walked / head.cap)
    for what, own, found in (("last hidden states", states, normed), ("logits", logits, walked)):
        difference, largest = float((own - found).abs().max()), float(own.abs().max())
        if largest < torch.inf and not difference <= torch.finfo(model.dtype).eps ** 0.5 * largest:
            raise _does_not_fit(model, f"its sub-blocks, one by one, end in other {what} than the model's own code")


def _does_not_fit(model: PreTrainedModel, why: str) -> InputError:
    where = f"the entry '{model.config.model_type}' in supernet/models/families.py does not fit this model"
    return InputError(
        f"{where}: {why}; correct it, or choose another model: sub-blocks must be x + post_norm(module(norm(x)))"
    )


@contextmanager
def _forward_replaced(replacements: Mapping[nn.Module, Any]) -> Iterator[None]:
    before = {
        module: module.__dict__.get("forward") for module in replacements
    }  # hooks of other libraries may sit there
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


def nonzero_count(model: nn.Module) -> int:
    """Parameters of a model that are not zero, tied ones once."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())
