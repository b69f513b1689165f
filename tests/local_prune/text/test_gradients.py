"""Gradients walked backwards sub-block by sub-block against autograd on the whole model."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from local_prune.methods.gblm import weight_gradient_norms
from local_prune.methods.taylor import member_saliencies
from local_prune.pruner import Calibration
from local_prune.text import passes
from local_prune.text.gradients import gradients
from local_prune.text.passes import next_token_loss
from search.inputs.models import LoadedModel
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, by_query_heads, sub_blocks
from supernet.models.forward import entry

CPU = torch.device("cpu")


def track(items: Any, title: str) -> Any:
    return items


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64 whose parameters ask for gradients."""
    return copy.deepcopy(model).double().requires_grad_(True)


def reference(model: PreTrainedModel, ids: Tensor, first: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The mean loss from a position on, and the gradients by sub-block and layer, of a backward pass through the whole
    model.
    """
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits[:, first:-1].flatten(0, 1), ids[:, first + 1 :].flatten())
    loss.backward()
    found = {}
    for part in sub_blocks(model):
        for stage in part.stages:
            for layer in stage:
                module = part.module.get_submodule(layer)
                gradient = module.weight.grad
                found[f"{part.name}.{layer}"] = gradient.T if isinstance(module, Conv1D) else gradient
    return float(loss.detach()), found


def walk(model: PreTrainedModel, ids: Tensor, unscored: int = 0) -> tuple[float, dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def visit(part: SubBlock, of_layers: Mapping[str, Tensor]) -> None:
        found.update({f"{part.name}.{layer}": gradient for layer, gradient in of_layers.items()})

    return gradients(model, ids, CPU, visit, unscored), found


def assert_equal_gradients(model: PreTrainedModel, ids: Tensor, unscored: int = 0) -> None:
    loss, expected = reference(model, ids, unscored)
    found_loss, found = walk(model, ids, unscored)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].any()
        scale = float(expected[name].abs().max())
        # norms work in float32 all the same
        torch.testing.assert_close(found[name], expected[name], rtol=0.0, atol=2e-6 * scale)


def test_gradients_are_those_of_the_whole_model(any_model: PreTrainedModel, ids: Tensor) -> None:
    assert_equal_gradients(double(any_model), ids)


def test_leading_tokens_are_no_targets(tiny_llama: LoadedModel, ids: Tensor) -> None:
    model = double(tiny_llama.model)
    assert_equal_gradients(model, ids, unscored=3)
    calibration = Calibration(ids, batch=2, unscored=3)
    norms = weight_gradient_norms(tiny_llama.model, calibration, CPU, track, 2)
    saliencies = member_saliencies(tiny_llama.model, sub_blocks(tiny_llama.model), calibration, CPU, track)
    each = [reference(model, one, 3)[1] for one in ids.split(1)]
    for name, norm in norms.items():
        expected = sum(found[name].double().square() for found in each)
        torch.testing.assert_close(norm.double().square(), expected, rtol=1e-3, atol=1e-9)
    unlike = member_saliencies(tiny_llama.model, sub_blocks(tiny_llama.model), Calibration(ids, batch=2), CPU, track)
    assert all(not torch.allclose(saliencies[name], unlike[name]) for name in unlike)


def test_many_predictions_are_taken_in_chunks(
    tiny_llama: LoadedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PREDICTIONS", 7)
    assert_equal_gradients(double(tiny_llama.model), ids)


def test_the_model_is_left_alone(tiny_llama: LoadedModel, ids: Tensor) -> None:
    model = tiny_llama.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    walk(model, ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_small_dtypes_are_float32_and_near(
    tiny_llama: LoadedModel, ids: Tensor, dtype: torch.dtype
) -> None:
    _, expected = reference(double(tiny_llama.model), ids)
    _, found = walk(tiny_llama.model.to(dtype), ids)
    for name in expected:
        assert found[name].dtype == torch.float32
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.1


def test_no_gradient_is_lost_to_float16(tiny_llama: LoadedModel) -> None:
    """The gradient of a mean over many tokens, taken in float16, would be rounded to zero where it is below 6e-8."""
    many = torch.randint(200, (4, 256), generator=torch.Generator().manual_seed(0))
    model = tiny_llama.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
        model.model.norm.weight.mul_(0.03)
    _, expected = reference(double(model), many)
    _, found = walk(model.half(), many)
    name = "model.layers.0.mlp.down_proj"
    assert float(expected[name].abs().median()) < 6e-8
    assert (found[name].double() - expected[name]).norm() < 0.1 * expected[name].norm()


def test_the_loss_is_the_model_s_own(any_model: PreTrainedModel, ids: Tensor) -> None:
    hidden, contexts = entry(any_model, ids)
    for part in sub_blocks(any_model):
        hidden = part(hidden, contexts[part.block])
    expected = float(any_model(input_ids=ids, labels=ids).loss)
    assert next_token_loss(any_model, hidden, ids) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_norms_are_over_sequences(tiny_llama: LoadedModel, ids: Tensor, power: int) -> None:
    model = double(tiny_llama.model)
    each = [reference(model, one)[1] for one in ids.split(1)]
    found = weight_gradient_norms(tiny_llama.model, Calibration(ids, batch=2), CPU, track, power)
    assert found.keys() == each[0].keys()
    for name, norm in found.items():
        expected = torch.stack([of[name] for of in each]).norm(p=power, dim=0).float()
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("query_heads", [False, True], ids=["KV groups", "query heads"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_saliencies_are_of_the_gradient_over_the_whole_text(
    tiny_llama: LoadedModel, ids: Tensor, batch: int, query_heads: bool
) -> None:
    """Rows and columns that go with a member are written out here."""
    model = double(tiny_llama.model)
    gradient = reference(model, ids)[1]
    parts = sub_blocks(tiny_llama.model)
    asked = by_query_heads(parts) if query_heads else parts
    found = member_saliencies(tiny_llama.model, asked, Calibration(ids, batch=batch), CPU, track)
    assert list(found) == [part.name for part in parts]

    def product(part: SubBlock, layer: str) -> Tensor:
        return (gradient[f"{part.name}.{layer}"] * part.weight(layer).double()).abs()

    for part in parts:
        if part.kind == "mlp":
            rows, width, members, column = {"gate_proj": 1, "up_proj": 1}, 1, 256, "down_proj"
        elif query_heads:
            rows, width, members, column = {"q_proj": 8}, 8, 8, "o_proj"
        else:  # 4 KV groups of 2 query heads, of 8 channels
            rows, width, members, column = {"q_proj": 16, "k_proj": 8, "v_proj": 8}, 16, 4, "o_proj"
        expected = torch.zeros(members, dtype=torch.float64)
        for m in range(members):
            for layer, count in rows.items():
                expected[m] += product(part, layer)[m * count : (m + 1) * count].sum()
            expected[m] += product(part, column)[:, m * width : (m + 1) * width].sum()
        torch.testing.assert_close(found[part.name], expected.float(), rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_saliencies_of_fused_rows(model_of: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    """Queries, keys and values in one layer: a member's rows lie in three places."""
    model = model_of("phi3")
    exact = double(model)
    gradient = reference(exact, ids)[1]
    found = member_saliencies(model, sub_blocks(model), Calibration(ids), CPU, track)
    part = sub_blocks(exact)[0]
    qkv, out = (
        (gradient[f"{part.name}.{layer}"] * part.weight(layer)).abs().detach() for layer in ("qkv_proj", "o_proj")
    )
    for m in range(4):
        rows = [*range(16 * m, 16 * m + 16), *range(64 + 8 * m, 72 + 8 * m), *range(96 + 8 * m, 104 + 8 * m)]
        expected = float(qkv[rows].sum() + out[:, 16 * m : 16 * m + 16].sum())
        assert float(found[part.name][m]) == pytest.approx(expected, rel=1e-3)


def test_sub_blocks_without_members_have_no_saliencies(mixer_model: PreTrainedModel, ids: Tensor) -> None:
    assert member_saliencies(mixer_model, sub_blocks(mixer_model), Calibration(ids), CPU, track) == {}


def test_a_norm_that_is_none_is_refused(tiny_llama: LoadedModel, ids: Tensor) -> None:
    with pytest.raises(InputError, match=r"is 3 but must be 1 or 2"):
        weight_gradient_norms(tiny_llama.model, Calibration(ids), CPU, track, 3)


def test_one_token_is_refused(tiny_llama: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"no next token.*sequence_length"):
        walk(tiny_llama.model, torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_refused(tiny_llama: LoadedModel, ids: Tensor, value: float) -> None:
    with torch.no_grad():
        tiny_llama.model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(InputError, match=r"not finite; check the model's weights"):
        member_saliencies(tiny_llama.model, sub_blocks(tiny_llama.model), Calibration(ids), CPU, track)
