"""Sub-blocks run one by one are the model, whatever its family, and leave no trace on it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from supernet.candidates import Members, member_columns
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, blocks, by_query_heads, parameter_count, sub_blocks
from supernet.models.families import FAMILIES, Family, heads_of
from supernet.models.forward import check_walk, entry, final_norm_and_head
from supernet.models.modeling_pruned import PRUNED_CLASSES
from supernet.models.placement import parameters, sliced, zeroed
from supernet.space import ATTENTION, MIXER, MLP

ModelOf = Callable[..., PreTrainedModel]


@contextmanager
def captured_inputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What these modules receive, in the order of their calls."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])) for module in modules
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def has_no_trace(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    normed, head = final_norm_and_head(model, hidden)
    logits: Tensor = head.linear(normed)
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def layers_of(parts: tuple[SubBlock, ...]) -> list[tuple[SubBlock, str]]:
    return [(part, layer) for part in parts for stage in part.stages for layer in stage]


def state_of(part: SubBlock, layer: str, name: str) -> str:
    return part.state_name(f"{layer}.{name}")


def test_sub_blocks_in_order_are_the_model(any_model: PreTrainedModel, ids: Tensor) -> None:
    parts = sub_blocks(any_model)
    with captured_inputs([part.norm for part in parts]) as expected:
        logits = any_model(ids).logits
    hidden, contexts = entry(any_model, ids)
    for part, before in zip(parts, expected, strict=True):
        torch.testing.assert_close(hidden, before.view(hidden.shape))  # OPT's MLP sees all tokens in one dimension
        hidden = part(hidden, contexts[part.block])
    torch.testing.assert_close(logits_of(any_model, hidden), logits)
    assert has_no_trace(any_model)


def test_masks_reach_every_attention(family_model: PreTrainedModel, ids: Tensor) -> None:
    """SDPA does without a mask where all is causal; eager attention never does."""
    model = copy.deepcopy(family_model)
    model.set_attn_implementation("eager")
    hidden, contexts = entry(model, ids)
    for part in sub_blocks(model):
        hidden = part(hidden, contexts[part.block])
    torch.testing.assert_close(logits_of(model, hidden), model(ids).logits)
    torch.testing.assert_close(logits_of(model, hidden), family_model(ids).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_as_the_model_does(any_model: PreTrainedModel, ids: Tensor) -> None:
    model = copy.deepcopy(any_model).bfloat16()
    hidden, contexts = entry(model, ids)
    for part in sub_blocks(model):
        hidden = part(hidden, contexts[part.block])
    torch.testing.assert_close(logits_of(model, hidden).float(), model(ids).logits.float(), rtol=0, atol=0)


def test_a_residual_stream_in_float32_stays_there(mixer_model: PreTrainedModel, ids: Tensor) -> None:
    model = copy.deepcopy(mixer_model).bfloat16()
    hidden, contexts = entry(model, ids)
    assert hidden.dtype == torch.bfloat16
    assert sub_blocks(model)[0](hidden, contexts[0]).dtype == torch.float32


def test_the_logits_cap_of_gemma_2_matters(model_of: ModelOf, ids: Tensor) -> None:
    model = model_of("gemma2")
    _, head = final_norm_and_head(model, entry(model, ids)[0])
    assert head.cap == model.config.final_logit_softcapping
    assert model(ids).logits.abs().max() > 0.9 * head.cap


def test_names_lead_to_the_modules(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    kinds = (MIXER,) if "mamba" in any_model.config.model_type else (ATTENTION, MLP)
    assert [(part.block, part.kind) for part in parts] == [(b, kind) for b in range(3) for kind in kinds]
    state = any_model.state_dict()
    for part in parts:
        if any_model.config.model_type != "opt" or part.kind != MLP:
            assert any_model.get_submodule(part.name) is part.module
        assert any_model.get_submodule(part.norm_name) is part.norm
        assert (part.post_norm is None) == (part.post_norm_name is None)
        if part.post_norm_name is not None:
            assert any_model.get_submodule(part.post_norm_name) is part.post_norm
        for name, tensor in part.module.state_dict().items():
            assert state[part.state_name(name)].data_ptr() == tensor.data_ptr()


def test_a_block_s_own_state_is_that_of_its_sub_blocks(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    for index in range(3):
        own = [name for part in parts if part.block == index for name in part.own_state]
        prefix = next(part.block_name for part in parts if part.block == index)
        assert sorted(own) == sorted(name for name in any_model.state_dict() if name.startswith(f"{prefix}."))


def test_weights_are_out_by_in(any_model: PreTrainedModel) -> None:
    state = any_model.state_dict()
    for part, layer in layers_of(sub_blocks(any_model)):
        module = part.module.get_submodule(layer)
        inputs = torch.randn(2, part.weight(layer).shape[1])
        bias = part.bias(layer)
        expected = inputs @ part.weight(layer).T + (0 if bias is None else bias)
        torch.testing.assert_close(module(inputs), expected)
        assert part.weight(layer).data_ptr() == state[state_of(part, layer, "weight")].data_ptr()  # a view, no copy
        assert (bias is None) == (state_of(part, layer, "bias") not in state)


def test_every_linear_layer_has_a_stage(any_model: PreTrainedModel) -> None:
    for part in sub_blocks(any_model):
        linear = {name for name, module in part.module.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        assert linear - {"dt_proj"} == {
            layer for stage in part.stages for layer in stage
        }  # Mamba does not call dt_proj
        assert part.column == part.stages[-1][0] and len(part.stages[-1]) == 1


def test_replaced_stands_for_another_weight(any_model: PreTrainedModel, ids: Tensor) -> None:
    hidden, contexts = entry(any_model, ids)
    for part, layer in layers_of(sub_blocks(any_model)[:2]):
        weight = torch.randn(part.weight(layer).shape, generator=torch.Generator().manual_seed(0))
        bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(1))
        changed = replace(part, module=copy.deepcopy(part.module))
        changed.weight(layer).copy_(weight)
        context = contexts[part.block]
        torch.testing.assert_close(part(hidden, context, part.replaced(layer, weight)), changed(hidden, context))
        any_layer: Any = changed.module.get_submodule(layer)
        any_layer.bias = nn.Parameter(bias)  # whether or not there was one
        torch.testing.assert_close(part(hidden, context, part.replaced(layer, weight, bias)), changed(hidden, context))


def test_parameters_are_all_but_norms(any_model: PreTrainedModel) -> None:
    state = any_model.state_dict()
    for part in sub_blocks(any_model):
        names = [name for name in part.own_state if "norm" not in name and ".ln_" not in name]
        assert part.parameters == sum(state[name].numel() for name in names)


def test_member_parameters_sum_to_those_of_the_linear_layers(family_model: PreTrainedModel) -> None:
    for part in sub_blocks(family_model):
        assert part.groups is not None
        linear = [module for module in part.module.modules() if isinstance(module, nn.Linear | Conv1D)]
        count = sum(parameter_count(layer) for layer in linear)
        bias = part.bias(part.column)
        if bias is not None:
            count -= bias.numel()  # belongs to no member
        assert part.groups.members * part.member_parameters == count


def test_mixers_have_no_members(mixer_model: PreTrainedModel) -> None:
    assert all(part.groups is None and part.query_heads is None for part in sub_blocks(mixer_model))


def test_inputs_are_what_a_layer_receives(any_model: PreTrainedModel, ids: Tensor) -> None:
    parts = sub_blocks(any_model)
    _, contexts = entry(any_model, ids)
    for part, layer in layers_of(parts):
        with captured_inputs([part.norm]) as streams, captured_inputs([part.module.get_submodule(layer)]) as inputs:
            any_model(ids)
        hidden = streams[0].view(*ids.shape, -1)
        X = part.inputs(layer, hidden, contexts[part.block])
        assert X.shape == (ids.numel(), part.weight(layer).shape[1])
        torch.testing.assert_close(X, inputs[0].reshape(X.shape))
    assert has_no_trace(any_model)


def test_inputs_with_other_weights_before(any_model: PreTrainedModel, ids: Tensor) -> None:
    hidden, contexts = entry(any_model, ids)
    part = sub_blocks(any_model)[0]
    layer = part.stages[0][-1]
    weight = part.weight(layer) * 0.5
    changed = replace(part, module=copy.deepcopy(part.module))
    changed.weight(layer).copy_(weight)
    before, expected = (one.inputs(part.column, hidden, contexts[0]) for one in (part, changed))
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(part.inputs(part.column, hidden, contexts[0], part.replaced(layer, weight)), expected)


def test_inputs_do_without_what_is_behind(any_model: PreTrainedModel, ids: Tensor) -> None:
    part = sub_blocks(any_model)[0]
    hidden, contexts = entry(any_model, ids)
    with captured_inputs([part.module.get_submodule(part.column)]) as inputs:
        part.inputs(part.stages[0][0], hidden, contexts[0])
    assert not inputs


def removed(part: SubBlock, kept: Tensor) -> SubBlock:
    """A copy with zeros in all rows and columns of the members that are gone; their biases too."""
    changed = replace(part, module=copy.deepcopy(part.module))
    assert part.groups is not None
    gone = torch.tensor([member for member in range(part.groups.members) if member not in kept.tolist()])
    changed.weight(part.column)[:, member_columns(gone, part.groups.width)] = 0.0
    for rows in part.groups.rows:
        index = rows.offset + member_columns(gone, rows.count)
        changed.weight(rows.layer)[index] = 0.0
        bias = changed.bias(rows.layer)
        if bias is not None:
            bias[index] = 0.0
    return changed


@pytest.mark.parametrize("query_heads", [False, True], ids=["KV groups", "query heads"])
def test_removing_members_is_zeroing_their_rows_and_columns(
    family_model: PreTrainedModel, ids: Tensor, query_heads: bool
) -> None:
    hidden, contexts = entry(family_model, ids)
    parts = sub_blocks(family_model)[:2]
    for part in by_query_heads(parts) if query_heads else parts:
        assert part.groups is not None
        kept = torch.tensor([0, 2, part.groups.members - 1])
        candidate, context = Members(kept, None), contexts[part.block]
        expected = removed(part, kept)(hidden, context)
        assert not torch.allclose(expected, part(hidden, context), atol=1e-3)
        torch.testing.assert_close(part(hidden, context, zeroed(part, candidate)), expected)
        torch.testing.assert_close(part(hidden, context, parameters(part, None, candidate)), expected)
        if part.groups.slices:
            smaller = sliced(part, candidate)
            assert smaller[f"{part.column}.weight"].numel() < part.weight(part.column).numel()
            torch.testing.assert_close(part(hidden, context, smaller), expected)


def test_rows_of_a_member_are_its_own(family_model: PreTrainedModel, ids: Tensor) -> None:
    """What a member puts into the last layer depends on its rows alone."""
    hidden, contexts = entry(family_model, ids)
    for part in sub_blocks(family_model)[:2]:
        assert part.groups is not None
        kept = torch.tensor([1, 3])
        before, behind = (one.inputs(part.column, hidden, contexts[0]) for one in (part, removed(part, kept)))
        columns = member_columns(kept, part.groups.width)
        torch.testing.assert_close(behind[:, columns], before[:, columns])
        assert (
            len({rows.layer for rows in part.groups.rows} ^ {layer for stage in part.stages[:-1] for layer in stage})
            == 0
        )


def test_forward_is_restored_after_exceptions(family_model: PreTrainedModel, ids: Tensor) -> None:
    part = sub_blocks(family_model)[0]
    before = family_model(ids).logits
    with pytest.raises(IndexError):
        entry(family_model, ids + 1_000)  # no such tokens
    hidden, _ = entry(family_model, ids)
    with pytest.raises(RuntimeError):
        part.inputs(part.column, hidden[..., 1:], {})  # too narrow
    assert has_no_trace(family_model)
    assert torch.equal(family_model(ids).logits, before)


def test_entry_caches_no_keys(any_model: PreTrainedModel, ids: Tensor) -> None:
    _, contexts = entry(any_model, ids)
    assert len(contexts) == len(blocks(any_model))
    assert not any({"past_key_values", "use_cache", "cache_params"} & context.keys() for context in contexts)


def test_dropout_is_off(model_of: ModelOf, ids: Tensor) -> None:
    for name in ("gpt2", "opt"):  # whose configs have dropout
        model = model_of(name)
        hidden, contexts = entry(model, ids)
        part = sub_blocks(model)[1]
        assert torch.equal(part(hidden, contexts[0]), part(hidden, contexts[0]))


def test_heads(family_model: PreTrainedModel) -> None:
    heads = heads_of(family_model.config)
    expected = (4, 1, 16) if family_model.config.model_type in ("opt", "gpt2") else (4, 2, 8)
    assert (heads.groups, heads.queries, heads.dim) == expected


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 11,
    }
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    known = (
        r"'gpt_neox' is not known; known are llama, .*mamba2; .*one entry in supernet/models/families\.py, "
        r"and .*two classes in supernet/models/modeling_pruned\.py"
    )
    with pytest.raises(InputError, match=known):
        sub_blocks(model)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, "blocks must be pre-norm .*do_layer_norm_before=False"),
        ("opt", {"_remove_final_layer_norm": True}, "norm behind the last block"),
        ("opt", {"word_embed_proj_dim": 32}, "embeddings must be as wide"),
        ("gpt2", {"add_cross_attention": True}, "without cross-attention .*add_cross_attention=True"),
    ],
)
def test_unknown_variants_of_a_family_are_refused(
    model_of: ModelOf, name: str, change: dict[str, Any], why: str
) -> None:
    model = model_of(name, **change)
    with pytest.raises(InputError, match=f"this variant of '{name}' is not known: .*{why}"):
        sub_blocks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_is_walked_as_it_computes(any_model: PreTrainedModel, dtype: torch.dtype) -> None:
    check_walk(copy.deepcopy(any_model).to(dtype))


@pytest.fixture
def granite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a model of Llama's modules, which may do more with what they compute: (entry, **changes of its config)."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "vocab_size": 11,
    }

    def make(family: Family, **changes: Any) -> Any:
        monkeypatch.setitem(FAMILIES, "granite", family)
        model: Any = GraniteForCausalLM(GraniteConfig(**sizes, pad_token_id=0, **changes)).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter.detach(), std=0.2, generator=generator)
        return model

    return make


def test_an_entry_that_fits_is_all_that_a_family_takes(granite: Callable[..., Any]) -> None:
    check_walk(granite(Family(), embedding_multiplier=3.0, attention_multiplier=0.5))


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        (Family(), {"residual_multiplier": 0.2}, "end in other last hidden states"),
        (Family(), {"logits_scaling": 4.0}, "end in other logits"),
        (Family(mlp_norm="input_layernorm"), {}, "end in other last hidden states"),
        (Family(mlp="feed_forward"), {}, "no attribute `feed_forward`"),
        (Family(final_norm="norm"), {}, "no attribute `norm`"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(
    granite: Callable[..., Any], family: Family, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(
        InputError, match=f"^the entry 'granite' in supernet/models/families.py does not fit this model: .*{why}"
    ) as told:
        check_walk(granite(family, **changes))
    assert "\n" not in str(told.value)


def test_what_is_not_finite_is_left_to_the_build(granite: Callable[..., Any]) -> None:
    model = granite(Family())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    check_walk(model)


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
