"""A handle on one linear layer of a module, whatever way the module keeps it.

transformers keeps a linear layer as an `nn.Linear`, as a `Conv1D` (GPT-2, whose weight is transposed), or as one slice
of a parameter that stacks the weights of all experts of a mixture. A `Layer` hides the difference: it shows the weight
as (d_out, d_in), says which parameters stand for another weight, and where the layer's inputs can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from supernet.errors import InputError

PRUNABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One linear layer: `layer_of` makes one from its name.

    Attributes:
        name: Path within the module that it was looked up in: "q_proj", or "experts.down_proj.3" for the fourth expert.
        module: The module that holds the parameters, and whose call sees the inputs.
        parameter: Name of the weight in `module`.
        index: Which slice of a stacked parameter (experts, ., .) is the weight; None where the parameter is the weight.
        transposed: Whether the weight is kept as (d_in, d_out).
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    index: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as a view, (d_out, d_in)."""
        found: Tensor = getattr(self.module, self.parameter)
        found = found if self.index is None else found[self.index]
        return found.T if self.transposed else found

    @property
    def bias(self) -> Tensor | None:
        """The bias as a view, (d_out,); None where the layer has none."""
        found: Tensor | None = getattr(self.module, self._bias_name, None)
        return found if found is None or self.index is None else found[self.index]

    def replaced(self, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters that stand for this layer with another weight (d_out, d_in), and bias if one is given.

        Names are paths of parameters in the module that the layer was looked up in. A slice of a stacked parameter has
        its index behind the path, "experts.down_proj[3]", so that what is known of several experts can be united;
        `with_stacks` makes whole parameters of them.
        """
        if self.transposed:
            weight = weight.T.contiguous()
        found = {self._path(self.parameter): weight}
        return found if bias is None else found | {self._path(self._bias_name): bias}

    @property
    def _bias_name(self) -> str:
        return "bias" if self.index is None else f"{self.parameter}_bias"

    def _path(self, parameter: str) -> str:
        if self.index is None:
            return f"{self.name}.{parameter}"
        return f"{self.name.removesuffix(f'{self.parameter}.{self.index}')}{parameter}[{self.index}]"


def layer_of(module: nn.Module, name: str) -> Layer:
    """The linear layer of a module at a path.

    Args:
        module: Holds the layer somewhere below it.
        name: Path of a linear module, or of a stacked parameter with the index of a slice behind it.

    Raises:
        InputError: What is there is no linear layer whose weights are floating-point numbers.
    """
    holder, dot, index = name.rpartition(".")
    if index.isdecimal():
        path, _, parameter = holder.rpartition(".")
        experts = module.get_submodule(path)
        if isinstance(experts._parameters.get(parameter), nn.Parameter):  # else a list of modules, one an expert
            return _checked(Layer(name, experts, parameter, int(index), bool(getattr(experts, "is_transposed", False))))
    found = module.get_submodule(name)
    if not isinstance(found, nn.Linear | Conv1D):
        raise _not_linear(name, f"it is of the class {type(found).__name__}")
    return _checked(Layer(name, found, transposed=isinstance(found, Conv1D)))


def _checked(layer: Layer) -> Layer:
    dtype = getattr(layer.module, layer.parameter).dtype
    if dtype not in PRUNABLE_DTYPES:
        raise _not_linear(layer.name, f"its weight is {dtype}")
    return layer


def _not_linear(name: str, why: str) -> InputError:
    return InputError(
        f"the layer {name} cannot be pruned: {why}, not the weight of a linear layer in floating-point numbers; load "
        "the model as it was before it was quantised, or correct its entry in supernet/models/families.py"
    )


def with_stacks(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters of a module from what `Layer.replaced` gives: slices are put into their stacks.

    Slices that are not given are the module's own, or those of the whole stack where that is among the parameters.
    """
    whole: dict[str, Tensor] = {}
    slices: dict[str, dict[int, Tensor]] = {}
    for name, tensor in parameters.items():
        path, bracket, index = name.partition("[")
        if bracket:
            slices.setdefault(path, {})[int(index.removesuffix("]"))] = tensor
        else:
            whole[name] = tensor
    for path, given in slices.items():
        stack = whole[path] if path in whole else module.get_parameter(path)
        whole[path] = torch.stack([given[index] if index in given else own for index, own in enumerate(stack)])
    return whole


Receive = Callable[..., Tensor]
"""What a layer gets, from the call of the module that holds it: (layer, *arguments of the call) -> X (tokens, d_in).

It is called while the module would run, so that the module's parameters are those that are in place then.
"""


def first_argument(layer: Layer, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The `Receive` of linear modules: what they are called with, (..., d_in) -> (tokens, d_in)."""
    return inputs.flatten(0, -2)


def routed_tokens(layer: Layer, hidden: Tensor, chosen: Tensor, *_: Any, **__: Any) -> Tensor:
    """The `Receive` of experts that are stacked as transformers >= 5 does (Mixtral, Qwen3-MoE, DeepSeek-V3, ...).

    There is no call for each expert: one module gets all tokens, and which experts each token goes to. Its parameters
    are `gate_up_proj`, whose inputs are the tokens that are sent to the expert, and `down_proj`, whose inputs are
    computed from these as the module does.

    Args:
        layer: A slice of either parameter.
        hidden: (tokens, hidden), of all tokens.
        chosen: (tokens, k), the experts that each token goes to.

    Returns:
        One row a token that goes to the expert, in the order of the tokens: (tokens of the expert, d_in).
    """
    assert layer.index is not None
    tokens = hidden[(chosen == layer.index).any(-1)]
    if layer.parameter == "gate_up_proj":
        return tokens
    first = Layer(layer.name, layer.module, "gate_up_proj", layer.index, layer.transposed)
    gated: Tensor = getattr(layer.module, "_apply_gate")(linear(tokens, first.weight, first.bias))  # noqa: B009
    return gated


class _SeenError(Exception):
    """Ends a forward pass where its result is known."""


def inputs_of(layer: Layer, run: Callable[[], Any], receive: Receive = first_argument) -> Tensor:
    """What a layer gets as inputs, (tokens, d_in), while `run` runs a module around it; nothing behind is computed."""
    seen: list[Tensor] = []

    def record(*arguments: Any, **named: Any) -> Tensor:
        seen.append(receive(layer, *arguments, **named))
        raise _SeenError

    with forward_replaced({layer.module: record}):
        try:
            run()
        except _SeenError:
            pass
    return seen[0]


@contextmanager
def forward_replaced(replacements: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let modules do something else when they are called; afterwards they are as they were."""
    # hooks of other libraries may sit there
    before = {module: module.__dict__.get("forward") for module in replacements}
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
