"""Whatever way a module keeps a linear layer, a handle shows its weight, replaces it and sees its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from supernet.errors import InputError
from supernet.models.layers import Layer, Receive, first_argument, inputs_of, layer_of, routed_tokens, with_stacks

EXPERTS, CHOSEN, HIDDEN, NEURONS, TOKENS = 4, 2, 6, 5, 40


@dataclass(frozen=True)
class Case:
    """A module that holds a linear layer.

    Attributes:
        run: Calls the module, parameters by name standing for its own.
        name: Of the layer.
        shape: (d_out, d_in) that its weight must have.
        receive: How its inputs are seen.
        parameters: Names of its weight and its bias as `Layer.replaced` calls them.
    """

    module: nn.Module
    hidden: Tensor
    name: str
    shape: tuple[int, int]
    receive: Receive
    parameters: tuple[str, str]

    def run(self, parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(self.module, with_stacks(self.module, parameters), (self.hidden,))
        return output


def filled(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter.detach(), std=0.5, generator=generator)
    return module.requires_grad_(False)


def sequential(layer: nn.Module) -> nn.Module:
    return filled(nn.Sequential(nn.LayerNorm(HIDDEN), layer, nn.GELU()))


class GptOssBlock(nn.Module):
    """gpt-oss keeps (experts, in, out), gate and up interleaved, and has biases."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = GptOssExperts(config)

    def forward(self, hidden: Tensor) -> Tensor:
        weights, chosen = self.router(hidden).topk(CHOSEN, dim=-1)
        output: Tensor = self.experts(hidden, chosen, weights.softmax(-1))
        return output


SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN, "experts_implementation": "eager"}


def mixtral() -> nn.Module:
    return filled(MixtralSparseMoeBlock(MixtralConfig(intermediate_size=NEURONS, num_local_experts=EXPERTS, **SIZES)))


def qwen3_moe() -> nn.Module:
    return filled(Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(moe_intermediate_size=NEURONS, num_experts=EXPERTS, **SIZES)))


def gpt_oss() -> nn.Module:
    return filled(GptOssBlock(GptOssConfig(intermediate_size=NEURONS, num_local_experts=EXPERTS, **SIZES)))


def expert_case(block: Callable[[], nn.Module], parameter: str, flat: bool) -> Case:
    shape = (2 * NEURONS, HIDDEN) if parameter == "gate_up_proj" else (HIDDEN, NEURONS)
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden = hidden if flat else hidden.view(2, TOKENS // 2, HIDDEN)
    names = f"experts.{parameter}[2]", f"experts.{parameter}_bias[2]"
    return Case(block(), hidden, f"experts.{parameter}.2", shape, routed_tokens, names)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: linear_case(nn.Linear(HIDDEN, 5)),
    "linear without bias": lambda: linear_case(nn.Linear(HIDDEN, 5, bias=False)),
    "Conv1D": lambda: linear_case(Conv1D(5, HIDDEN)),
    "Mixtral, first": lambda: expert_case(mixtral, "gate_up_proj", False),
    "Mixtral, last": lambda: expert_case(mixtral, "down_proj", False),
    "Qwen3-MoE, first": lambda: expert_case(qwen3_moe, "gate_up_proj", False),
    "Qwen3-MoE, last": lambda: expert_case(qwen3_moe, "down_proj", False),
    "gpt-oss, first": lambda: expert_case(gpt_oss, "gate_up_proj", True),
    "gpt-oss, last": lambda: expert_case(gpt_oss, "down_proj", True),
}


def linear_case(layer: nn.Module) -> Case:
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    return Case(sequential(layer), hidden, "1", (5, HIDDEN), first_argument, ("1.weight", "1.bias"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def handle(case: Case) -> Layer:
    return layer_of(case.module, case.name)


def test_the_weight_is_a_view_of_the_parameter_as_outputs_by_inputs(case: Case) -> None:
    layer = handle(case)
    before = layer.weight.clone()
    assert layer.weight.shape == case.shape
    layer.weight[1, 2] = 100.0
    assert (handle(case).weight != before).nonzero().tolist() == [[1, 2]]


def test_a_layer_that_stands_for_itself_changes_nothing(case: Case) -> None:
    layer = handle(case)
    given = layer.replaced(layer.weight, layer.bias)
    assert tuple(given) == case.parameters[: len(given)]
    assert len(given) == 1 + (layer.bias is not None)
    assert torch.equal(case.run(given), case.run({}))


def test_another_weight_and_bias_are_what_the_module_computes_with(case: Case) -> None:
    layer, generator = handle(case), torch.Generator().manual_seed(2)
    weight = torch.randn(layer.weight.shape, generator=generator)
    bias = None if layer.bias is None else torch.randn(layer.bias.shape, generator=generator)
    found = case.run(layer.replaced(weight, bias))
    assert not torch.allclose(found, case.run({}))
    layer.weight.copy_(weight)
    if bias is not None:
        assert layer.bias is not None
        layer.bias.copy_(bias)
    assert torch.equal(found, case.run({}))


def test_inputs_are_those_that_the_layer_multiplies(case: Case) -> None:
    layer = handle(case)
    X = inputs_of(layer, lambda: case.run({}), case.receive)
    assert X.shape == (X.shape[0], case.shape[1]) and 0 < len(X) <= case.hidden[..., 0].numel()
    torch.testing.assert_close(X, brute_force(case, layer))
    assert not any("forward" in vars(module) for module in case.module.modules())


def brute_force(case: Case, layer: Layer) -> Tensor:
    """The inputs as a hook on the linear module sees them, or from what the experts are called with."""
    seen: list[Any] = []
    hook = layer.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    case.run({})
    hook.remove()
    if layer.index is None:
        inputs: Tensor = seen[0][0].flatten(0, -2)
        return inputs
    experts: Any = layer.module
    hidden, chosen = seen[0][:2]
    rows = torch.stack([row for row, own in zip(hidden, chosen.tolist(), strict=True) if layer.index in own])
    if layer.parameter == "gate_up_proj":
        return rows
    first, last = experts.gate_up_proj[layer.index], getattr(experts, "gate_up_proj_bias", None)
    both = rows @ first + last[layer.index] if last is not None else linear(rows, first)
    gated: Tensor = experts._apply_gate(both)
    return gated


def test_inputs_of_experts_add_up_to_the_output_of_the_module() -> None:
    """Each expert's rows times its weight, weighted as the router says, are what the whole block puts out."""
    case = expert_case(mixtral, "down_proj", False)
    block: Any = case.module
    _, weights, chosen = block.gate(case.hidden.flatten(0, 1))
    total = torch.zeros(TOKENS, HIDDEN)
    for index in range(EXPERTS):
        layer = layer_of(block, f"experts.down_proj.{index}")
        rows, ranks = (chosen == index).nonzero(as_tuple=True)
        X = inputs_of(layer, lambda: case.run({}), routed_tokens)
        total[rows] += weights[rows, ranks, None] * (X @ layer.weight.T)
    torch.testing.assert_close(total, case.run({}).flatten(0, 1))


def test_slices_of_one_stack_are_united_whoever_gives_them(case: Case) -> None:
    layer = handle(case)
    if layer.index is None:
        assert list(with_stacks(case.module, layer.replaced(layer.weight))) == ["1.weight"]  # there is no stack
        return
    name = case.parameters[0].partition("[")[0]
    other = layer_of(case.module, case.name.removesuffix("2") + "0")
    given = layer.replaced(torch.zeros_like(layer.weight)) | other.replaced(torch.ones_like(other.weight))
    whole = with_stacks(case.module, given)
    dense = case.module.get_parameter(name)
    assert list(whole) == [name]
    assert not whole[name][2].any() and torch.equal(whole[name][0], torch.ones_like(whole[name][0]))
    assert torch.equal(whole[name][[1, 3]], dense[[1, 3]])
    smaller = with_stacks(case.module, {name: dense[:3] * 2, **layer.replaced(torch.zeros_like(layer.weight))})
    assert len(smaller[name]) == 3 and torch.equal(smaller[name][:2], dense[:2] * 2) and not smaller[name][2].any()


def test_gradients_reach_a_weight_that_stands_in(case: Case) -> None:
    layer = handle(case)
    leaf = layer.weight.clone().requires_grad_()
    with torch.enable_grad():
        case.run(layer.replaced(leaf)).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())


def test_inputs_follow_the_parameters_that_are_in_place() -> None:
    case = expert_case(mixtral, "down_proj", False)
    first = layer_of(case.module, "experts.gate_up_proj.2")
    found = inputs_of(handle(case), lambda: case.run(first.replaced(first.weight * 2)), routed_tokens)
    first.weight.mul_(2)
    assert torch.equal(found, inputs_of(handle(case), lambda: case.run({}), routed_tokens))


def test_a_list_of_modules_is_no_stack() -> None:
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 4)])})
    layer = layer_of(experts, "experts.1")
    assert layer.index is None and layer.weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "why"), [("embedding", "it is of the class Embedding"), ("codes", "its weight is torch.int8")]
)
def test_what_is_no_linear_layer_in_floats_is_refused(name: str, why: str) -> None:
    codes = nn.Linear(3, 2).requires_grad_(False)
    codes.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "codes": codes})
    with pytest.raises(InputError, match=f"^the layer {name} cannot be pruned: {why}, .*before it was quantised"):
        layer_of(module, name)
