"""An assembled model computes what the dense one does with zeros, at a fraction of its parameters."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.architecture import entry, final_norm_and_head, parameter_count, sub_blocks
from supernet.assemble import assemble
from supernet.encoding import sliced
from supernet.modeling_pruned import PRUNED_CLASSES
from supernet.space import Space
from supernet.store import Supernet

Allocation = tuple[int, ...]
MIXED: Allocation = (0, 1, 2, 0, 1, 2)
ALLOCATIONS: dict[str, Allocation] = {
    "dense": (0, 0, 0, 0, 0, 0),
    "uniform": (2, 1, 2, 1, 2, 1),
    "mixed": MIXED,
    "first attention and an MLP absent": (3, 1, 1, 3, 0, 2),
    "all attention absent": (3, 0, 3, 1, 3, 2),
    "a whole block absent": (1, 1, 3, 3, 0, 0),
    "nothing left": (3, 3, 3, 3, 3, 3),
}


def logits_by_sub_blocks(model: PreTrainedModel, supernet: Supernet, allocation: Allocation, ids: Tensor) -> Tensor:
    """As a search runs it: dense sub-blocks with sliced weights, absent ones left out."""
    hidden, contexts = entry(model, ids)
    for index, (part, level) in enumerate(zip(sub_blocks(model), allocation, strict=True)):
        if level == 0:
            hidden = part(hidden, contexts[part.block])
        elif len(supernet.candidate(index, level).kept):
            hidden = part(hidden, contexts[part.block], sliced(part, supernet.candidate(index, level)))
    normed, head = final_norm_and_head(model, hidden)
    logits: Tensor = head(normed)
    return logits


def parameters_left(model: PreTrainedModel, space: Space, allocation: Allocation) -> int:
    """What the space says, without what goes with a sub-block's last member: norms, and the projection's bias."""
    count = parameter_count(model) - space.dense_cost + space.cost(allocation)
    for part, unit, level in zip(sub_blocks(model), space.units, allocation, strict=True):
        if unit.levels[level].kept == 0:
            count -= parameter_count(part.module) + parameter_count(part.norm) - unit.levels[0].cost
    return count


@torch.no_grad()
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_smaller_model_computes_what_zeros_compute(
    family_model: PreTrainedModel,
    family_supernet: Supernet,
    name: str,
    ids: Tensor,
    with_zeros: Callable[[PreTrainedModel, Supernet, Sequence[int]], PreTrainedModel],
) -> None:
    allocation = ALLOCATIONS[name]
    pruned = assemble(family_model, family_supernet, allocation)

    logits = pruned(ids).logits
    torch.testing.assert_close(logits, with_zeros(family_model, family_supernet, allocation)(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, logits_by_sub_blocks(family_model, family_supernet, allocation, ids), rtol=1e-4, atol=1e-4)

    assert parameter_count(pruned) == parameters_left(family_model, family_supernet.space, allocation)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in pruned.parameters())
    assert not any(buffer.is_meta for buffer in pruned.buffers())

    stock = name in ("dense", "uniform")
    assert type(pruned) is (type(family_model) if stock else PRUNED_CLASSES[family_model.config.model_type])
    assert pruned.config.is_heterogeneous != stock


def test_three_groups_of_four_need_the_pruned_class(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    pruned = assemble(
        family_model, family_supernet, (1, 0) * 3
    )  # six heads do not divide the hidden size: the stock config refuses
    assert type(pruned) is PRUNED_CLASSES[family_model.config.model_type]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_is_not_pruned_shares_memory(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    dense, pruned = family_model.state_dict(), assemble(family_model, family_supernet, MIXED).state_dict()
    changed = {f"{part.name}." for part, level in zip(sub_blocks(family_model), MIXED, strict=True) if level}
    for name, tensor in pruned.items():
        belongs_to_members = name.startswith(tuple(changed)) and tensor.shape != dense[name].shape
        assert (storage(tensor) == storage(dense[name])) != belongs_to_members, name


def test_the_dense_model_and_its_config_stay_as_they_are(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor
) -> None:
    config, logits = copy.deepcopy(family_model.config.to_dict()), family_model(ids).logits
    for allocation in ALLOCATIONS.values():
        assemble(family_model, family_supernet, allocation)
    assert family_model.config.to_dict() == config
    assert torch.equal(family_model(ids).logits, logits)


def test_tied_embeddings_stay_tied(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    pruned = assemble(family_model, family_supernet, MIXED)
    tied = pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert tied == family_model.config.tie_word_embeddings


def test_generation_settings_are_the_dense_ones(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    pruned = assemble(family_model, family_supernet, MIXED)
    assert pruned.generation_config is family_model.generation_config
    assert not pruned.training


def test_bfloat16_stays_bfloat16(family_model: PreTrainedModel, random_supernet: Callable[[PreTrainedModel], Supernet]) -> None:
    model = copy.deepcopy(family_model)
    for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    pruned = assemble(model, random_supernet(model), MIXED)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    rotary = [buffer for name, buffer in pruned.named_buffers() if "inv_freq" in name]
    assert rotary
    for buffer, expected in zip(rotary, [b for n, b in family_model.named_buffers() if "inv_freq" in n], strict=True):
        assert torch.equal(buffer, expected)
