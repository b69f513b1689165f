"""What is rounded to the dtype of a file, and what keeps sharing its memory."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from search.export.rounding import rounded

ModelOf = Callable[..., PreTrainedModel]


def test_weights_that_do_not_change_keep_their_memory(model_of: ModelOf) -> None:
    model = model_of("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.data = parameter.data.bfloat16().float()
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    assert rounded(model, torch.bfloat16) is model
    for name, parameter in model.named_parameters():
        pointer, value = before[name]
        assert torch.equal(parameter, value.bfloat16().float())
        assert (parameter.data_ptr() == pointer) == torch.equal(parameter, value) == (".layers.0." in name), name


@pytest.mark.parametrize(
    ("own", "other"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)]
)
def test_a_wider_file_holds_all(model_of: ModelOf, own: torch.dtype, other: torch.dtype) -> None:
    model = model_of("llama").to(own)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    assert [parameter.data_ptr() for parameter in rounded(model, other).parameters()] == before
