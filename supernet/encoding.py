"""The compact form of a candidate: the kept columns of its projection and which members they belong to, never zeros.

What is only sliced from the dense model (query, key, value, gate and up rows) is not part of a candidate; `sliced` cuts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.architecture import SubBlock


@dataclass(frozen=True)
class Candidate:
    """A unit's weights at one level.

    Attributes:
        kept: (k,) int64, rising: the members that stay.
        weight: (d_out, k * width): the projection's columns of those members, refitted.
    """

    kept: Tensor
    weight: Tensor


def encode(candidates: Mapping[int, Candidate]) -> dict[str, Tensor]:
    """Level -> candidate as named tensors for one file. Level 0 is the dense model's own weight and is never stored."""
    tensors = {}
    for level, candidate in candidates.items():
        tensors[f"{level}.kept"] = candidate.kept.to(torch.int32).cpu()
        tensors[f"{level}.weight"] = candidate.weight.contiguous().cpu()
    return tensors


def member_columns(kept: Tensor, width: int) -> Tensor:
    """(k,) members -> (k * width,) the columns (or rows) that belong to them, in order."""
    return (kept.unsqueeze(1) * width + torch.arange(width, device=kept.device)).flatten()


def sliced(part: SubBlock, candidate: Candidate) -> dict[str, Tensor]:
    """All parameters of a sub-block's module at a candidate that keeps at least one member, by name, really smaller.

    Parameters that belong to no member (an output bias, the norms of queries and keys) are left to the module itself.
    """
    tensors = {f"{part.column}.weight": candidate.weight}
    for name, rows in part.rows.items():
        layer = part.module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        index = member_columns(candidate.kept.to(layer.weight.device), rows)
        tensors[f"{name}.weight"] = layer.weight.index_select(0, index)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.index_select(0, index)
    return tensors
