"""An assembled model computes what the dense one does with zeros, at a fraction of its parameters."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel, PreTrainedTokenizerBase

from supernet.errors import InputError
from supernet.models.architecture import parameter_count, sub_blocks
from supernet.models.assemble import assemble, check_family
from supernet.models.families import FAMILIES, Family
from supernet.models.forward import entry, final_norm_and_head
from supernet.models.modeling_pruned import PRUNED_CLASSES, PrunedMixin
from supernet.models.placement import places
from supernet.space import Space
from supernet.store import Supernet
from tests.exports import export

Allocation = tuple[int, ...]
WithZeros = Callable[[PreTrainedModel, Supernet, Sequence[int]], PreTrainedModel]
SupernetOf = Callable[[PreTrainedModel, str], Supernet]
ModelOf = Callable[..., PreTrainedModel]
MIXED: Allocation = (0, 1, 2, 0, 1, 2)
ALLOCATIONS: dict[str, Allocation] = {
    "dense": (0, 0, 0, 0, 0, 0),
    "uniform": (2, 1, 2, 1, 2, 1),
    "uniform neurons": (0, 1, 0, 1, 0, 1),
    "mixed": MIXED,
    "first attention and an MLP absent": (3, 1, 1, 3, 0, 2),
    "all attention absent": (3, 0, 3, 1, 3, 2),
    "a whole block absent": (1, 1, 3, 3, 0, 0),
    "a whole block absent, the others alike": (0, 2, 3, 3, 0, 2),
    "two whole blocks absent": (3, 3, 2, 1, 3, 3),
    "nothing left": (3, 3, 3, 3, 3, 3),
}
# of which all families' own classes can be
STOCK = ("dense", "uniform neurons", "a whole block absent, the others alike")
STOCK_WITH_HEADS = ("uniform", "two whole blocks absent")  # those too whose configs have a head_dim


def logits_by_sub_blocks(model: PreTrainedModel, supernet: Supernet, allocation: Allocation, ids: Tensor) -> Tensor:
    """As a search runs it: dense sub-blocks with other parameters, absent ones left out."""
    hidden, contexts = entry(model, ids)
    for place in places(model, supernet.space):
        candidates = [
            supernet.candidate(unit, allocation[unit]) if allocation[unit] else None for unit, _ in place.units
        ]
        weights = place.weights(candidates)
        if weights is not None:
            hidden = place.part(hidden, contexts[place.part.block], weights)
    normed, head = final_norm_and_head(model, hidden)
    logits: Tensor = head.linear(normed)
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def own_parameters(model: PreTrainedModel, names: Sequence[str]) -> int:
    state = model.state_dict()
    return sum(state[name].numel() for name in names)


def parameters_left(model: PreTrainedModel, space: Space, allocation: Allocation) -> int:
    """What the space says, without what goes with a sub-block's last member: norms, and the projection's bias."""
    count = parameter_count(model) - space.dense_cost + space.cost(allocation)
    for part, unit, level in zip(sub_blocks(model), space.units, allocation, strict=True):
        if unit.levels[level].kept == 0:
            count -= own_parameters(model, part.own_state) - unit.levels[0].cost
    return count


def is_whole(model: PreTrainedModel) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_smaller_model_computes_what_zeros_compute(
    family_model: PreTrainedModel, family_supernet: Supernet, name: str, ids: Tensor, with_zeros: WithZeros
) -> None:
    allocation = ALLOCATIONS[name]
    pruned = assemble(family_model, family_supernet, allocation)

    logits = pruned(ids).logits
    torch.testing.assert_close(
        logits, with_zeros(family_model, family_supernet, allocation)(ids).logits, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        logits, logits_by_sub_blocks(family_model, family_supernet, allocation, ids), rtol=1e-4, atol=1e-4
    )

    assert parameter_count(pruned) == parameters_left(family_model, family_supernet.space, allocation)
    assert is_whole(pruned)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())

    stock = name in STOCK or (name in STOCK_WITH_HEADS and family_model.config.model_type not in ("opt", "gpt2"))
    assert type(pruned) is (type(family_model) if stock else PRUNED_CLASSES[family_model.config.model_type])
    assert pruned.config.is_heterogeneous != stock


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("kind", ["compensated members", "query heads", "weights", "bits", "sub-blocks", "blocks"])
def test_every_kind_of_unit_computes_what_zeros_compute(
    family_model: PreTrainedModel,
    supernet_of: SupernetOf,
    kind: str,
    ids: Tensor,
    with_zeros: WithZeros,
    random_allocations: Callable[..., list[Allocation]],
) -> None:
    supernet = supernet_of(family_model, kind)
    for allocation in random_allocations(supernet.space, 2, seed=4):
        pruned = assemble(family_model, supernet, allocation)
        logits = pruned(ids).logits
        expected = with_zeros(family_model, supernet, allocation)(ids).logits
        assert not torch.allclose(expected, family_model(ids).logits, atol=0.01)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            logits, logits_by_sub_blocks(family_model, supernet, allocation, ids), rtol=1e-4, atol=1e-4
        )
        if kind in ("weights", "bits", "blocks"):
            assert type(pruned) is type(family_model)


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("kind", ["weights", "bits", "sub-blocks", "blocks"])
def test_every_kind_of_unit_of_mixers_keeps_the_family_s_own_class(
    mixer_model: PreTrainedModel, supernet_of: SupernetOf, kind: str, ids: Tensor, with_zeros: WithZeros
) -> None:
    supernet = supernet_of(mixer_model, kind)
    for allocation in ((0, 1, 0), (1, 1, 1)) if "block" in kind else ((1, 0, 2) * (len(supernet.space.units) // 3),):
        pruned = assemble(mixer_model, supernet, allocation)
        expected = with_zeros(mixer_model, supernet, allocation)(ids).logits
        torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert type(pruned) is type(mixer_model) and is_whole(pruned)
        assert pruned.config.num_hidden_layers == (3 - sum(allocation) if "block" in kind else 3)


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama_with_biases", "qwen3", "gemma3"])
def test_query_heads_are_taken_out_and_each_left_meets_its_own_keys(
    name: str, implementation: str, model_of: ModelOf, supernet_of: SupernetOf, ids: Tensor, with_zeros: WithZeros
) -> None:
    model = model_of(name)
    supernet = supernet_of(model, "query heads")
    allocation = (1, 2) * 3
    pruned = assemble(model, supernet, allocation)
    assert parameter_count(pruned) == parameter_count(model) - supernet.space.dense_cost + supernet.space.cost(
        allocation
    )
    pruned.set_attn_implementation(implementation)
    expected = with_zeros(model, supernet, allocation)(ids).logits
    torch.testing.assert_close(pruned(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    pruned = copy.deepcopy(pruned)
    first = pruned(ids[:, :7], use_cache=True)
    rest = pruned(ids[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), expected, rtol=1e-4, atol=1e-4)
    static = pruned.generate(
        ids, max_new_tokens=3, cache_implementation="static", prefill_chunk_size=4, do_sample=False
    )
    assert torch.equal(static, pruned.generate(ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("name", ["phi3", "opt", "gpt2"])
def test_query_heads_that_cannot_be_taken_out_are_zero(name: str, model_of: ModelOf, supernet_of: SupernetOf) -> None:
    model = model_of(name)
    supernet = supernet_of(model, "query heads")
    allocation = (1, 0) * 3
    pruned = assemble(model, supernet, allocation)
    nonzero = sum(int(parameter.count_nonzero()) for parameter in pruned.parameters())
    dense = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    assert nonzero == dense - supernet.space.dense_cost + supernet.space.cost(allocation)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_the_dense_model_s_tensors_are_one_whatever_the_config_says(
    tied: bool, model_of: ModelOf, supernet_of: SupernetOf, ids: Tensor
) -> None:
    model = model_of("llama", tie_word_embeddings=tied)
    model.config.tie_word_embeddings = not tied
    supernet = supernet_of(model, "weights")
    pruned = assemble(model, supernet, (0,) * len(supernet.space.units))
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits)
    assert pruned.config.tie_word_embeddings == tied and parameter_count(pruned) == parameter_count(model)


@pytest.mark.parametrize("level", [(0, 0), (1, 0)], ids=["stock", "pruned"])
def test_names_of_strangers_code_are_left_behind(
    level: tuple[int, int], model_of: ModelOf, supernet_of: SupernetOf
) -> None:
    model = model_of("llama")
    model.config.auto_map = {"AutoConfig": "stranger/repo--evil.C"}
    pruned = assemble(model, supernet_of(model, "sub-blocks"), level * 3)
    assert "evil" not in str(pruned.config.to_dict())


def test_layers_that_are_left_keep_their_types(model_of: ModelOf, supernet_of: SupernetOf) -> None:
    model = model_of("gemma3")
    pruned = assemble(model, supernet_of(model, "blocks"), (1, 0, 0))
    assert pruned.config.num_hidden_layers == 2
    assert pruned.config.layer_types == model.config.layer_types[1:] == ["full_attention", "sliding_attention"]


def test_layers_whose_number_matters_are_skipped_instead(
    model_of: ModelOf, supernet_of: SupernetOf, ids: Tensor, with_zeros: WithZeros
) -> None:
    model = model_of("gpt2", scale_attn_by_inverse_layer_idx=True)
    supernet = supernet_of(model, "blocks")
    pruned = assemble(model, supernet, (1, 0, 0))
    assert type(pruned) is PRUNED_CLASSES["gpt2"]
    torch.testing.assert_close(
        pruned(ids).logits, with_zeros(model, supernet, (1, 0, 0))(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_three_groups_of_four_need_the_pruned_class(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    # six heads do not divide the hidden size: the stock config refuses
    pruned = assemble(family_model, family_supernet, (1, 0) * 3)
    assert type(pruned) is PRUNED_CLASSES[family_model.config.model_type]


def test_compensation_gives_a_bias_where_the_family_has_none(model_of: ModelOf, supernet_of: SupernetOf) -> None:
    model = model_of("llama")
    supernet = supernet_of(model, "compensated members")
    pruned = assemble(model, supernet, (2, 0, 0, 2, 2, 2))
    biases = {name for name in pruned.state_dict() if name.endswith("bias")}
    columns = (
        "layers.0.self_attn.o_proj",
        "layers.1.mlp.down_proj",
        "layers.2.self_attn.o_proj",
        "layers.2.mlp.down_proj",
    )
    assert biases == {f"model.{column}.bias" for column in columns}
    assert torch.equal(pruned.state_dict()["model.layers.2.mlp.down_proj.bias"], supernet.candidate(5, 2).bias)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_is_not_pruned_shares_memory(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    dense, pruned = family_model.state_dict(), assemble(family_model, family_supernet, MIXED).state_dict()
    parts = [part for part, level in zip(sub_blocks(family_model), MIXED, strict=True) if level]
    changed = {part.state_name(name) for part in parts for name in part.module.state_dict()}
    for name, tensor in pruned.items():
        belongs_to_members = name in changed and tensor.shape != dense[name].shape
        assert (storage(tensor) == storage(dense[name])) != belongs_to_members, name


def test_blocks_that_are_left_share_memory(any_model: PreTrainedModel, supernet_of: SupernetOf) -> None:
    supernet = supernet_of(any_model, "blocks")
    pruned = assemble(any_model, supernet, (0, 1, 0))
    dense = any_model.state_dict()
    last = supernet.space.units[2].name
    behind = {name: tensor for name, tensor in pruned.state_dict().items() if name.startswith(last.replace("2", "1"))}
    assert behind
    for name, tensor in behind.items():
        assert storage(tensor) == storage(dense[name.replace(last.replace("2", "1"), last)])


@pytest.mark.sampled
def test_the_dense_model_and_its_config_stay_as_they_are(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor
) -> None:
    config, logits = copy.deepcopy(family_model.config.to_dict()), family_model(ids).logits
    for allocation in ALLOCATIONS.values():
        assemble(family_model, family_supernet, allocation)
    assert family_model.config.to_dict() == config
    assert torch.equal(family_model(ids).logits, logits)


def test_tied_embeddings_stay_tied(any_model: PreTrainedModel, supernet_of: SupernetOf) -> None:
    pruned = assemble(any_model, supernet_of(any_model, "blocks"), (0, 1, 0))
    tied = pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert tied == any_model.config.tie_word_embeddings


def test_generation_settings_are_the_dense_ones(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    pruned = assemble(family_model, family_supernet, MIXED)
    assert pruned.generation_config is family_model.generation_config
    assert not pruned.training


def test_bfloat16_stays_bfloat16(
    family_model: PreTrainedModel, random_supernet: Callable[[PreTrainedModel], Supernet]
) -> None:
    model = copy.deepcopy(family_model)
    for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    pruned = assemble(model, random_supernet(model), MIXED)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert dict(pruned.named_buffers()).keys() == dict(family_model.named_buffers()).keys()
    for name, buffer in pruned.named_buffers():
        assert torch.equal(buffer, dict(family_model.named_buffers())[name])


def test_rotary_frequencies_that_grew_with_a_long_text_do_not_stay(
    model_of: ModelOf, supernet_of: SupernetOf, ids: Tensor
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = model_of("llama", max_position_embeddings=16, rope_parameters=scaling)
    expected = model(ids).logits
    frequencies = model.model.rotary_emb.inv_freq
    model(ids.repeat(1, 3))
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    supernet = supernet_of(model, "blocks")
    assert torch.equal(assemble(model, supernet, (0, 0, 0))(ids).logits, expected)


def greedy(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    found: Any = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings)  # type: ignore[operator]
    return found


def assert_export_is(
    model: PreTrainedModel, stock: bool, ids: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    export(model, tokenizer, folder)
    assert isinstance(model, PrunedMixin) != stock
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not stock)
    assert type(loaded).__name__ == type(model).__name__
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    generated = greedy(model, ids)
    assert torch.equal(greedy(loaded, ids), generated)
    assert torch.equal(greedy(loaded, ids, use_cache=False), generated)


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.usefixtures("remote_code_stays_here")
@pytest.mark.parametrize(
    ("kind", "allocation"), [("compensated members", (1, 2, 0, 1, 2, 0)), ("sub-blocks", (1, 0, 0, 0, 0, 1))]
)
def test_an_export_is_the_model_in_memory(
    family_model: PreTrainedModel,
    supernet_of: SupernetOf,
    kind: str,
    allocation: Allocation,
    ids: Tensor,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = assemble(family_model, supernet_of(family_model, kind), allocation)
    assert_export_is(model, False, ids, byte_tokenizer, tmp_path / "export")


@torch.no_grad()
def test_an_export_without_a_block_needs_no_code(
    any_model: PreTrainedModel,
    supernet_of: SupernetOf,
    ids: Tensor,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = assemble(any_model, supernet_of(any_model, "blocks"), (0, 1, 0))
    assert_export_is(model, True, ids, byte_tokenizer, tmp_path / "export")


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "rope_theta": 10000.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 for long texts": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "gpt2 with as many neurons as most have": ("gpt2", {"n_inner": None}),
    "llama with a head_dim of its own": ("llama", {"head_dim": 24}),
    "opt without biases and with plain norms": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gemma3 with biases": ("gemma3", {"attention_bias": True}),
}


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.usefixtures("remote_code_stays_here")
@pytest.mark.parametrize("allocation", [(1, 2, 0, 1, 2, 0), (2, 2, 2, 2, 2, 2)], ids=["mixed", "alike"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_families(
    variant: str,
    allocation: Allocation,
    model_of: ModelOf,
    supernet_of: SupernetOf,
    with_zeros: WithZeros,
    ids: Tensor,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    name, changes = VARIANTS[variant]
    model = model_of(name, **changes)
    supernet = supernet_of(model, "members")
    pruned = assemble(model, supernet, allocation)
    torch.testing.assert_close(
        pruned(ids).logits, with_zeros(model, supernet, allocation)(ids).logits, rtol=1e-4, atol=1e-4
    )
    stock = name in ("llama", "gemma3") and len(set(allocation)) == 1
    assert_export_is(pruned, stock, ids, byte_tokenizer, tmp_path / "export")


def test_every_family_can_have_what_is_asked_of_it(any_model: PreTrainedModel) -> None:
    for structured in (False, True):
        check_family(any_model, structured)


WITHOUT_CLASSES = r"^the family 'granite' has an entry in .*families\.py but no classes in .*modeling_pruned\.py, "


def test_a_family_with_an_entry_alone(
    supernet_of: SupernetOf, random_supernet: Callable[..., Supernet], monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    """It can lose weights and blocks; that heads and neurons need classes is told before any work, and by the assembly
    itself.
    """
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 97}
    config = GraniteConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=8, pad_token_id=0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.raises(InputError, match="'granite' is not known"):
        check_family(model, False)
    monkeypatch.setitem(FAMILIES, "granite", Family())
    check_family(model, False)
    for kind in ("weights", "bits", "blocks"):
        supernet = supernet_of(model, kind)
        allocation = [1 if kind == "blocks" and index == 1 else 0 for index in range(len(supernet.space.units))]
        assert bool(assemble(model, supernet, allocation)(ids).logits.isfinite().all())
    with pytest.raises(InputError, match=WITHOUT_CLASSES):
        check_family(model, True)
    with pytest.raises(InputError, match=WITHOUT_CLASSES):
        assemble(model, random_supernet(model), MIXED)
