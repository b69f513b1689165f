"""Causal attention in bfloat16 or float16 on a CPU, about half again as fast as torch's own.

torch's fused kernel works on blocks that suit it badly on CPUs without matrix units; here scores are plain batched
matrix products in float32, in blocks of queries so that nothing above the diagonal but within a block is computed, with
the query heads of a group in one product. Whatever else is asked for (masks, other devices and dtypes) goes to torch's
kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sparsity_search_blocked"
BLOCK = 128  # queries in a product: fewer make small products, more compute more above the diagonal


@contextmanager
def blocked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on a CPU that uses torch's kernel use `attention` instead.

    Masks must have been made before (by `supernet.models.architecture.entry`): how they are made depends on the
    kernel's name.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: query (batch, heads, tokens, dim) -> (batch, tokens, heads,
    dim).
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and others.get("softcap") is None
    if not plain or query.device.type != "cpu" or query.shape[2] != key.shape[2] or value.shape[3] != query.shape[3]:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
        return output, None
    return blocked_causal(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def blocked_causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * Q K^T) V of earlier tokens. Scores are float32: rounded, large ones are off by tenths.

    Args:
        query: (batch, heads, tokens, dim).
        key: (batch, groups, tokens, dim), each group for heads / groups neighbouring heads.
        value: Like the keys.
        scaling: Of the scores.

    Returns:
        (batch, tokens, heads, dim).
    """
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    queries = query.reshape(batch, groups, heads // groups, tokens, dim)
    keys = key.reshape(batch * groups, tokens, dim).transpose(1, 2).float()
    values = value.reshape(batch * groups, tokens, dim)
    later = torch.full((min(BLOCK, tokens),) * 2, -torch.inf).triu_(1)
    output = query.new_empty(batch, tokens, heads, dim)
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        rows = queries[:, :, :, start:end].float().mul(scaling).reshape(batch * groups, -1, dim)  # of a group's heads
        scores = torch.bmm(rows, keys[:, :, :end]).view(batch * groups, heads // groups, end - start, end)
        scores[..., start:] += later[: end - start, : end - start]
        mixed = torch.bmm(scores.softmax(-1).to(value.dtype).view(batch * groups, -1, end), values[:, :end])
        output[:, start:end] = mixed.view(batch, heads, end - start, dim).transpose(1, 2)
    return output
