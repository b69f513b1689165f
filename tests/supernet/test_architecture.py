"""Sub-blocks run one by one are the model, whatever its family, and leave no trace on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel

from supernet.architecture import (
    ATTENTION,
    MLP,
    blocks,
    entry,
    final_norm_and_head,
    heads_of,
    parameter_count,
    sub_blocks,
)
from supernet.errors import InputError
from supernet.modeling_pruned import PRUNED_CLASSES


@contextmanager
def captured_inputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What these modules receive, in the order of their calls."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


def has_no_trace(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_sub_blocks_in_order_are_the_model(family_model: PreTrainedModel, ids: Tensor) -> None:
    parts = sub_blocks(family_model)
    with captured_inputs([part.norm for part in parts]) as expected:
        logits = family_model(ids).logits
    hidden, contexts = entry(family_model, ids)
    for part, before in zip(parts, expected, strict=True):
        torch.testing.assert_close(hidden, before)
        hidden = part(hidden, contexts[part.block])
    normed, head = final_norm_and_head(family_model, hidden)
    torch.testing.assert_close(head(normed), logits)
    assert has_no_trace(family_model)


def test_names_lead_to_the_modules(family_model: PreTrainedModel) -> None:
    parts = sub_blocks(family_model)
    assert [(part.block, part.kind) for part in parts] == [(b, kind) for b in range(3) for kind in (ATTENTION, MLP)]
    for part in parts:
        assert family_model.get_submodule(part.name) is part.module
        assert family_model.get_submodule(part.norm_name) is part.norm
        assert part.projection.in_features == part.members * part.width


def test_member_parameters_sum_to_those_of_the_linear_layers(family_model: PreTrainedModel) -> None:
    for part in sub_blocks(family_model):
        linear = [module for module in part.module.modules() if isinstance(module, nn.Linear)]
        count = sum(parameter_count(layer) for layer in linear)
        if part.projection.bias is not None:
            count -= part.projection.bias.numel()  # belongs to no member
        assert part.members * part.member_parameters == count


def test_projection_inputs_are_what_the_projection_receives(family_model: PreTrainedModel, ids: Tensor) -> None:
    parts = sub_blocks(family_model)
    with captured_inputs([part.norm for part in parts]) as streams, captured_inputs([p.projection for p in parts]) as inputs:
        family_model(ids)
    _, contexts = entry(family_model, ids)
    for part, hidden, expected in zip(parts, streams, inputs, strict=True):
        X = part.projection_inputs(hidden, contexts[part.block])
        assert X.shape == (ids.numel(), part.members * part.width)
        torch.testing.assert_close(X, expected.flatten(0, 1))
    assert has_no_trace(family_model)


def test_projection_inputs_do_without_the_product(family_model: PreTrainedModel, ids: Tensor) -> None:
    part = sub_blocks(family_model)[0]
    hidden, contexts = entry(family_model, ids)
    with captured_inputs([part.projection]) as inputs:
        part.projection_inputs(hidden, contexts[0])
    assert len(inputs) == 1  # the module is called, its own forward is not
    assert part.projection(inputs[0]).abs().max() > 0


def test_forward_is_restored_after_exceptions(family_model: PreTrainedModel, ids: Tensor) -> None:
    part = sub_blocks(family_model)[0]
    before = family_model(ids).logits
    with pytest.raises(IndexError):
        entry(family_model, ids + 1_000)  # no such tokens
    hidden, _ = entry(family_model, ids)
    with pytest.raises((TypeError, KeyError)):
        part.projection_inputs(hidden, {})  # attention without positions
    assert has_no_trace(family_model)
    assert torch.equal(family_model(ids).logits, before)


def test_entry_caches_no_keys(family_model: PreTrainedModel, ids: Tensor) -> None:
    _, contexts = entry(family_model, ids)
    assert len(contexts) == len(blocks(family_model))
    assert not any({"past_key_values", "use_cache"} & context.keys() for context in contexts)


def test_heads(family_model: PreTrainedModel) -> None:
    heads = heads_of(family_model.config)
    assert (heads.groups, heads.queries, heads.dim) == (4, 2, 8)


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11))
    with pytest.raises(InputError, match=r"'gpt2' is not known; known are llama, mistral, qwen2, qwen3;.*one entry"):
        sub_blocks(model)


def test_a_model_that_is_pruned_already_is_refused() -> None:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        head_dim=8,
        vocab_size=11,
        per_layer_config={1: {"intermediate_size": 16}},
        allow_global_per_layer_attribute_access=True,
    )
    model: Any = PRUNED_CLASSES["llama"](config)
    with pytest.raises(InputError, match="differ in size already"):
        sub_blocks(model)
