"""What a candidate is, one class a kind, and the compact tensors that it is stored as.

Values that are the dense model's own are never stored: a method that only chooses what stays gives candidates without weights,
and all of a unit's levels share one order of removal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Members:
    """Structured: the members (KV groups, query heads, neurons) that stay.

    Attributes:
        kept: (k,) int64, rising.
        weight: (d_out, k * width), the projection's columns of those members, refitted; None where they are the dense ones.
        bias: (d_out,), in place of the projection's own bias, which may be none; None where nothing makes up for the removed.
    """

    kept: Tensor
    weight: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Unstructured or N:M: the weights of a linear layer that stay.

    Attributes:
        mask: (d_out, d_in) bool, True where a weight stays.
        weight: (d_out, d_in), zero where the mask is False; None where kept weights are the dense ones.
    """

    mask: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Quantised:
    """A linear layer on a grid of `2 ** bits` values for each group of neighbouring inputs: `scale * (code - zero)`.

    Attributes:
        codes: (d_out, d_in) uint8, below 2 ** bits.
        scale: (d_out, groups), in the dense weight's dtype.
        zero: (d_out, groups) uint8, the code of 0.
        bits: Of a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), computed in float32 and rounded to the dtype of the scales."""
        d_out, groups = self.scale.shape
        steps = self.codes.view(d_out, groups, -1).float() - self.zero.unsqueeze(2).float()
        return (steps * self.scale.unsqueeze(2).float()).to(self.scale.dtype).view(self.codes.shape)


@dataclass(frozen=True)
class Dropped:
    """The whole sub-block, or block, is absent."""


Candidate = Members | Weights | Quantised | Dropped

MOST_ORDERED = 255  # levels that share one order of removal: it is kept in bytes while it is made


def member_columns(kept: Tensor, width: int) -> Tensor:
    """(k,) members -> (k * width,) the columns (or rows) that belong to them, in order."""
    return (kept.unsqueeze(1) * width + torch.arange(width, device=kept.device)).flatten()


def count(candidate: Candidate) -> int:
    """What a level counts: members, weights, or bits that are kept."""
    match candidate:
        case Members():
            return len(candidate.kept)
        case Weights():
            return int(candidate.mask.sum())
        case Quantised():
            return candidate.bits
        case Dropped():
            return 0


def moved(candidate: Candidate, device: torch.device | str) -> Candidate:
    """The same on another device."""
    values = {field.name: getattr(candidate, field.name) for field in fields(candidate)}
    there: dict[str, Any] = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
    return type(candidate)(**there)


def encode(candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """The candidates of levels 1, 2, ... as named tensors for one file; `decode` reads one of them back.

    Level 0 is the dense model's own weight and is never stored. Where all levels are nested and keep dense values, what is stored
    is the level at which each member or weight goes.
    """
    order = _order([_chosen(candidate) for candidate in candidates])
    tensors: dict[str, Tensor] = {}
    if order is not None:
        bits = len(candidates).bit_length()
        tensors |= {"order": _packed(order, bits), "shape": torch.tensor(order.shape)}
    for level, candidate in enumerate(candidates, start=1):
        named = _tensors(candidate, order is None)
        tensors |= {f"{level}.{name}": tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    return tensors


def decode(read: Callable[[str], Tensor], names: Sequence[str], level: int) -> Candidate:
    """The candidate of a level.

    Args:
        read: Gives the tensor of a name.
        names: Of all tensors there are.
        level: At least 1.
    """

    def optional(name: str) -> Tensor | None:
        return read(f"{level}.{name}") if f"{level}.{name}" in names else None

    if f"{level}.dropped" in names:
        return Dropped()
    if f"{level}.codes" in names:
        scale, planes = read(f"{level}.scale"), read(f"{level}.codes")
        codes = _unpacked(planes, read(f"{level}.shape"))
        zero = optional("zero")
        return Quantised(codes, scale, _middle(scale, len(planes)) if zero is None else zero, len(planes))
    if "order" in names:
        order = _unpacked(read("order"), read("shape"))
        chosen = (order == 0) | (order > level)
    elif f"{level}.mask" in names:
        chosen = _unpacked(read(f"{level}.mask"), read(f"{level}.shape")).bool()
    else:
        return Members(read(f"{level}.kept").long(), optional("weight"), optional("bias"))
    if chosen.dim() == 1:
        return Members(chosen.nonzero().flatten(), None, optional("bias"))
    values = optional("values")
    weight = None if values is None else torch.zeros(chosen.shape, dtype=values.dtype).masked_scatter_(chosen, values)
    return Weights(chosen, weight)


def _tensors(candidate: Candidate, with_choice: bool) -> dict[str, Tensor]:
    match candidate:
        case Members():
            named = {"kept": candidate.kept.int()} if with_choice else {}
            named |= {} if candidate.weight is None else {"weight": candidate.weight}
            return named | ({} if candidate.bias is None else {"bias": candidate.bias})
        case Weights():
            mask = candidate.mask
            named = {"mask": _packed(mask, 1), "shape": torch.tensor(mask.shape)} if with_choice else {}
            return named | ({} if candidate.weight is None else {"values": candidate.weight[mask]})
        case Quantised():
            shape = torch.tensor(candidate.codes.shape)
            codes = _packed(candidate.codes, candidate.bits)
            named = {"codes": codes, "shape": shape, "scale": candidate.scale}
            middle = torch.equal(candidate.zero, _middle(candidate.scale, candidate.bits))
            return named if middle else named | {"zero": candidate.zero}
        case Dropped():
            return {"dropped": torch.empty(0)}


def _middle(scale: Tensor, bits: int) -> Tensor:
    """The zeros of symmetric grids, which need not be stored: (d_out, groups) uint8, of scales of that shape."""
    return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)


def _chosen(candidate: Candidate) -> Tensor | None:
    """What stays, as a mask or as indices, where the values that stay are the dense ones."""
    if isinstance(candidate, Members | Weights) and candidate.weight is None:
        return candidate.kept if isinstance(candidate, Members) else candidate.mask
    return None


def _order(chosen: Sequence[Tensor | None]) -> Tensor | None:
    """The level at which each member or weight goes, 0 for those that stay.

    None where levels are not nested, not only chosen, or more than `MOST_ORDERED`.
    """
    if not 0 < len(chosen) <= MOST_ORDERED or any(one is None for one in chosen):
        return None
    if chosen[0].dtype != torch.bool:  # type: ignore[union-attr]
        size = max((int(one.max()) + 1 for one in chosen if len(one)), default=0)  # type: ignore[union-attr, arg-type]
        masks = [torch.zeros(size, dtype=torch.bool).index_fill_(0, one.cpu(), True) for one in chosen]  # type: ignore[union-attr]
    else:
        masks = [one.cpu() for one in chosen]  # type: ignore[union-attr]
    order = torch.zeros(masks[0].shape, dtype=torch.uint8)
    before = torch.ones_like(masks[0])
    for level, mask in enumerate(masks, start=1):
        if bool((mask & ~before).any()):
            return None
        order[before & ~mask] = level
        before = mask
    return order


def _packed(values: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2 ** bits as bit planes, (bits, ceil(n / 8)) uint8."""
    flat = values.detach().to("cpu", torch.uint8).flatten().numpy()
    return torch.from_numpy(np.stack([np.packbits((flat >> bit) & 1) for bit in range(bits)]))


def _unpacked(planes: Tensor, shape: Tensor) -> Tensor:
    """The inverse of `_packed`, uint8."""
    size = [int(length) for length in shape]
    length = int(np.prod(size))
    flat = np.zeros(length, dtype=np.uint8)
    for bit, plane in enumerate(planes.numpy()):
        flat |= np.unpackbits(plane, count=length) << bit
    return torch.from_numpy(flat).view(size)
