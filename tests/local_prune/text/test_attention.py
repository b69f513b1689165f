"""Causal attention in blocks of queries is the softmax by definition, and models use it only where it says what they
ask for.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from local_prune.text import attention
from local_prune.text.attention import BLOCK, NAME, blocked_attention, blocked_causal
from supernet.models.architecture import sub_blocks
from supernet.models.forward import entry

ModelOf = Callable[..., PreTrainedModel]


def by_definition(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    heads, tokens = query.shape[1:3]
    keys, values = (one.double().repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
    scores = scaling * query.double() @ keys.transpose(2, 3)
    scores += torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def drawn(batch: int, heads: int, groups: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as modules give them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, count, dim) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_are_the_softmax_by_definition(tokens: int, heads: int, groups: int, batch: int) -> None:
    query, key, value = drawn(batch, heads, groups, tokens, 8, torch.float32)
    found = blocked_causal(query, key, value, 0.3)
    assert found.shape == (batch, tokens, heads, 8)
    torch.testing.assert_close(found.double(), by_definition(query, key, value, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_error_is_that_of_rounding(dtype: torch.dtype) -> None:
    query, key, value = drawn(2, 6, 2, BLOCK + 30, 64, dtype)
    error = blocked_causal(query, key, value, 0.125).double() - by_definition(query, key, value, 0.125)
    assert float(error.abs().max()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1.0, 3.0, 6.0])
def test_large_scores_cost_no_more_accuracy_than_in_torchs_kernel(size: float) -> None:
    query, key, value = drawn(1, 6, 2, BLOCK + 30, 64, torch.bfloat16)
    query, key = query * size, key * size  # scores have a standard deviation of size ** 2
    exact = by_definition(query, key, value, 0.125)
    kernel = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(
        1, 2
    )
    ours, theirs = (
        (one.double() - exact).square().mean().sqrt() for one in (blocked_causal(query, key, value, 0.125), kernel)
    )
    assert float(ours) < 2 * float(theirs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "phi3", "opt", "gpt2"])
def test_models_in_bfloat16_give_what_they_give_with_torchs_kernel(family: str, model_of: ModelOf, ids: Tensor) -> None:
    model = model_of(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    hidden, contexts = entry(model, ids)
    kernel = model.config._attn_implementation
    for part in sub_blocks(model):
        expected = part(hidden, contexts[part.block])
        with blocked_attention(model):
            found = part(hidden, contexts[part.block])
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
        hidden = expected
    assert model.config._attn_implementation == kernel


def test_only_models_in_half_precision_that_use_torchs_kernel_are_changed(model_of: ModelOf) -> None:
    model = model_of("llama")
    with blocked_attention(model):
        assert model.config._attn_implementation == "sdpa"  # in float32 torch's kernel is as fast
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(KeyError), blocked_attention(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with blocked_attention(model):
        assert model.config._attn_implementation == "eager"


class Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("asked", ["mask", "not causal", "fewer queries"])
def test_what_blocks_cannot_do_goes_to_torchs_kernel(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(attention, "blocked_causal", refused)
    query, key, value = drawn(1, 4, 2, 9, 8, torch.bfloat16)
    mask, causal = None, None
    if asked == "mask":
        mask = torch.full((1, 1, 9, 9), -torch.inf).triu(1).bfloat16()
    elif asked == "not causal":
        causal = False
    else:
        query = query[:, :, -1:]
    found, _ = attention.attention(Module(), query, key, value, mask, scaling=0.3, is_causal=causal)
    if asked == "mask":
        torch.testing.assert_close(found.double(), by_definition(query, key, value, 0.3), rtol=0.02, atol=0.02)
    else:
        keys, values = (one.double().repeat_interleave(2, 1) for one in (key, value))
        whole = (0.3 * query.double() @ keys.transpose(2, 3)).softmax(-1) @ values
        torch.testing.assert_close(found.double(), whole.transpose(1, 2), rtol=0.02, atol=0.02)
