"""Causal attention in bfloat16 or float16 on a CPU, about half again as fast as torch's own.

torch's fused kernel works on blocks that suit CPUs without matrix units badly. Here scores are plain batched matrix
products in float32, with the query heads of a group in one product. They are taken in blocks of queries, so that above
the diagonal nothing is computed but within a block. Whatever else is asked for (masks, other devices) goes to torch's
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
BLOCK = 128  # queries in a product: with fewer the products are small, with more there is more above the diagonal


@contextmanager
def blocked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model in bfloat16 or float16 on a CPU use `attention` instead of torch's kernel; leave others alone.

    Masks must have been made before (by `supernet.models.forward.entry`), as how they are made depends on the kernel's
    name.
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
    """Attention as transformers calls it: query (batch, heads, tokens, dim) -> (batch, tokens, heads, dim)."""
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
    """Return softmax(scaling * Q K^T) V, where each token attends to itself and those before it.

    Scores are float32, as large ones would be off by tenths if they were rounded to 16 bits.

    Args:
        query: (batch, heads, tokens, dim).
        key: (batch, groups, tokens, dim), where each group serves heads / groups neighbouring heads.
        value: Of the shape of `key`.
        scaling: The factor on the scores.

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
