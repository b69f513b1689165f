"""A sub-block whose linear layers are slices of stacked experts is pruned by weights like any other one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from local_prune.text.passes import recorded
from supernet.candidates import Weights
from supernet.models.architecture import SubBlock
from supernet.models.layers import routed_tokens
from supernet.models.placement import Place
from supernet.models.prunables import weight_prunables
from supernet.space import MLP

EXPERTS, HIDDEN, NEURONS = 3, 16, 12


@pytest.fixture
def model() -> Any:
    config = MixtralConfig(
        num_hidden_layers=1,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=29,
        experts_implementation="eager",
    )
    model: Any = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter.detach(), std=0.4, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture
def part(model: Any) -> SubBlock:
    """What a family of such models would make: a stage for each layer of each expert, and how tokens are routed."""
    block = model.model.layers[0]
    return SubBlock(
        name="model.layers.0.mlp",
        kind=MLP,
        block=0,
        block_name="model.layers.0",
        prefix="model.layers.0.mlp",
        norm_name="model.layers.0.post_attention_layernorm",
        post_norm_name=None,
        module=block.mlp,
        norm=block.post_attention_layernorm,
        post_norm=None,
        stages=tuple((f"experts.{name}.{i}",) for name in ("gate_up_proj", "down_proj") for i in range(EXPERTS)),
        receive=routed_tokens,
    )


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(1))


def pruned(part: SubBlock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every layer with about half of its weights: what a place makes of that, and the layers' weights by name."""
    generator = torch.Generator().manual_seed(2)
    layers = [layer for stage in part.stages for layer in stage]
    masks = {layer: torch.rand(part.weight(layer).shape, generator=generator) < 0.5 for layer in layers}
    place = Place(part, tuple(enumerate(layers)))
    found = place.weights([Weights(mask, None) for mask in masks.values()])
    assert found is not None
    return found, {layer: part.weight(layer) * mask for layer, mask in masks.items()}


def test_every_layer_of_every_expert_is_a_unit(part: SubBlock) -> None:
    prunables = weight_prunables([part], ())
    assert [one.name for one in prunables] == [f"{part.name}.{layer}" for stage in part.stages for layer in stage]
    assert [one.total for one in prunables] == [2 * NEURONS * HIDDEN] * EXPERTS + [HIDDEN * NEURONS] * EXPERTS
    assert not part.ends_alone


@torch.no_grad()
def test_units_of_one_stack_are_pruned_together(model: Any, part: SubBlock, hidden: Tensor) -> None:
    replaced, weights = pruned(part)
    found, before = part(hidden, {}, replaced), part(hidden, {})
    assert torch.equal(before, part(hidden, {}))
    model.load_state_dict(model.state_dict() | part.state(replaced))
    assert all(torch.equal(part.weight(layer), weight) for layer, weight in weights.items())
    assert torch.equal(found, part(hidden, {})) and not torch.allclose(found, before)


@torch.no_grad()
def test_each_expert_sees_the_tokens_that_are_sent_to_it(part: SubBlock, hidden: Tensor) -> None:
    replaced, weights = pruned(part)
    module: Any = part.module
    normed = part.norm(hidden).flatten(0, 1)
    _, _, chosen = module.gate(normed)
    with recorded(part) as seen:
        part(hidden, {}, replaced)
    for index in range(EXPERTS):
        first, last = f"experts.gate_up_proj.{index}", f"experts.down_proj.{index}"
        tokens = normed[(chosen == index).any(-1)]
        gate, up = (tokens @ weights[first].T).chunk(2, -1)
        expected = {first: tokens, last: nn.functional.silu(gate) * up}
        for layer, inputs in expected.items():
            torch.testing.assert_close(part.inputs(layer, hidden, {}, replaced), inputs)
            torch.testing.assert_close(seen[layer], inputs)
    assert sum(len(seen[f"experts.down_proj.{index}"]) for index in range(EXPERTS)) == chosen.numel()


def test_gradients_of_all_experts_come_from_one_pass(part: SubBlock, hidden: Tensor) -> None:
    leaves = {layer: part.weight(layer).clone().requires_grad_() for stage in part.stages for layer in stage}
    replaced: dict[str, Tensor] = {}
    for layer, leaf in leaves.items():
        replaced |= part.replaced(layer, leaf)
    part(hidden, {}, replaced).square().sum().backward()
    stacks: Any = part.module
    stacks.experts.requires_grad_(True)
    part(hidden, {}).square().sum().backward()
    for layer, leaf in leaves.items():
        parameter, _, index = layer.removeprefix("experts.").partition(".")
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, stacks.experts.get_parameter(parameter).grad[int(index)])
