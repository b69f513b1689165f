"""Text goes by one walk through the blocks, which ends where the model's own forward pass does."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.text.passes import TextWalk
from supernet.models.architecture import SubBlock
from supernet.models.forward import final_norm_and_head

IDS = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")

ModelOf = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba"])
@torch.no_grad()
def test_steps_lead_to_the_models_own_last_states(model_of: ModelOf, family: str) -> None:
    model = model_of(family)
    walk = TextWalk(model, CPU)
    for ids in (IDS, IDS[:1], IDS[:, :9]):
        before = walk.enter(ids)
        steps = list(walk.steps(ids, record=True))
        assert [step.part.name for step in steps] == [part.name for part in walk.parts]
        for step in steps:
            assert torch.equal(step.before, before)
            before = step.behind
            column = step.part.column
            assert torch.equal(step.inputs[column], step.part.inputs(column, step.before, step.context))
        own = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(final_norm_and_head(model, before)[0], own)


@torch.no_grad()
def test_parameters_stand_for_those_of_a_sub_block_or_leave_it_out(model_of: ModelOf) -> None:
    model = model_of("llama")
    walk = TextWalk(model, CPU)
    halved, gone = walk.parts[1].name, walk.parts[2].name

    def replaced(part: SubBlock) -> Mapping[str, Tensor] | None:
        if part.name == gone:
            return None
        return part.replaced(part.column, 0.5 * part.weight(part.column)) if part.name == halved else {}

    for step in walk.steps(IDS, replaced, record=True):
        change = step.behind - step.before
        whole = step.part.change(step.before, step.context)
        expected = {halved: 0.5 * whole, gone: 0.0 * whole}.get(step.part.name, whole)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
        assert bool(step.inputs) == (step.part.name != gone)


@torch.no_grad()
def test_a_sub_block_ends_with_its_last_layer(any_model: PreTrainedModel) -> None:
    """What is computed from that layer's inputs alone is what the whole sub-block adds."""
    for step in TextWalk(any_model, CPU).steps(IDS, record=True):
        part = step.part
        if part.ends_alone:
            X = step.inputs[part.column].view(*step.before.shape[:2], -1)
            weights = part.replaced(part.column, 0.5 * part.weight(part.column))
            expected = part.change(step.before, step.context, weights)
            assert torch.equal(part.ended(X, weights), expected)
