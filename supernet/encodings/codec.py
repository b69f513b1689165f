"""Turns candidates into compact tensors: `encode` makes them, `decode` reads a candidate back.

Values that are the dense model's own are never stored: a method that only chooses what stays gives candidates without
weights, and all of a unit's levels share one order of removal where they are nested. These are the tensors of a level
(each name begins with the level's number; those in brackets may be missing):

    kept, [weight], [bias]              members: their indices and their columns
    [bias]                              members or weights whose choice is in the shared `order`, with its `shape`
    mask, shape, [values]               weights: a bit for each, and the values of those that stay
    ranks, shape, pattern, [values]     N:M weights: the set that each group keeps (`supernet.encodings.patterns`)
    codes, shape, scale, [zero]         quantised weights, in groups
    dropped                             a sub-block that is dropped

Each level also has `contents`: how much it keeps, and how many other tensors it has. Masks, orders, ranks and codes are
bit planes; shape, pattern, dropped and contents are headers (`supernet.encodings.tensors`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, count
from supernet.encodings.packing import at_least, gathered, keeps, plane_bytes, scattered, unpacked
from supernet.encodings.patterns import find_pattern, mask_of, rank_bits, ranks_of
from supernet.encodings.tensors import Stored, header, planes

# The most levels that may share one order of removal, which is a byte for each member or weight while it is made.
MOST_ORDERED = 255
INDEX = torch.int32  # how the indices of kept members are stored
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def encode(candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """Return named tensors on the CPU, for one file, with the candidates of levels 1, 2, ...

    Level 0 is the dense model's own weight and is never stored. Where all levels are nested and keep dense values, what
    is stored is the last level that keeps each member or weight, unless to store the levels one by one takes less.
    """
    masks = _ordered_masks(candidates)
    tensors: dict[str, Tensor] = {}
    if masks is not None:
        order = masks[0].to(torch.uint8)
        for mask in masks[1:]:
            order += mask
        tensors = planes("order", order, len(masks).bit_length())
    for level, candidate in enumerate(candidates, start=1):
        parts = (_choice(candidate) if masks is None else {}) | _values(candidate)
        parts["contents"] = header(count(candidate), len(parts))
        tensors |= {f"{level}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _choice(candidate: Candidate) -> dict[str, Tensor]:
    """Return the tensors that say which members or weights stay."""
    match candidate:
        case Members():
            return {"kept": candidate.kept.to(INDEX)}
        case Weights():
            mask = candidate.mask.cpu()
            pattern = find_pattern(mask)
            if pattern is None:
                return planes("mask", mask, 1)
            return planes("ranks", ranks_of(mask, *pattern), rank_bits(*pattern)) | {"pattern": header(*pattern)}
        case _:
            return {}


def _choice_bytes(candidate: Candidate) -> int:
    match candidate:
        case Members():
            return len(candidate.kept) * INDEX.itemsize
        case Weights():
            weights, pattern = candidate.mask.numel(), find_pattern(candidate.mask.cpu())
            return (
                plane_bytes(weights, 1) if pattern is None else plane_bytes(weights // pattern[1], rank_bits(*pattern))
            )
        case _:
            return 0


def _values(candidate: Candidate) -> dict[str, Tensor]:
    """Return the tensors with values that the dense model does not have."""
    match candidate:
        case Members():
            both = {"weight": candidate.weight, "bias": candidate.bias}
            return {name: tensor for name, tensor in both.items() if tensor is not None}
        case Weights():
            return {} if candidate.weight is None else {"values": gathered(candidate.weight, candidate.mask)}
        case Quantised():
            codes = candidate.codes.reshape(*candidate.scale.shape, -1)
            named = planes("codes", codes, candidate.bits) | {"scale": candidate.scale}
            return named if _is_symmetric(candidate) else named | {"zero": candidate.zero}
        case Dropped():
            return {"dropped": header()}


def _middle(scale: Tensor, bits: int) -> Tensor:
    """Return the zeros of symmetric grids, which are not stored: uint8, of the shape of the scales (d_out, groups)."""
    return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)


def _is_symmetric(candidate: Quantised) -> bool:
    return torch.equal(candidate.zero, _middle(candidate.scale, candidate.bits))


def _ordered_masks(candidates: Sequence[Candidate]) -> list[Tensor] | None:
    """Return what each level keeps, as masks on the CPU, if one order of removal stands for all levels and takes less.

    None says that levels are not nested, have values of their own, are more than `MOST_ORDERED`, or take less one by
    one.
    """
    chosen = [_chosen(candidate) for candidate in candidates]
    masks = [mask for mask in chosen if mask is not None]
    if not 0 < len(masks) == len(chosen) <= MOST_ORDERED:
        return None
    if masks[0].dtype != torch.bool:
        size = max(int(kept.max()) + 1 if len(kept) else 0 for kept in masks)
        masks = [torch.zeros(size, dtype=torch.bool).index_fill_(0, kept, True) for kept in masks]
    if any(bool((after & ~before).any()) for before, after in pairwise(masks)):
        return None
    return masks if _order_bytes(masks) <= sum(map(_choice_bytes, candidates)) else None


def _chosen(candidate: Candidate) -> Tensor | None:
    """Return what stays, as a mask or as indices; None where the values that stay are not the dense ones."""
    if isinstance(candidate, Members | Weights) and candidate.weight is None:
        return (candidate.kept if isinstance(candidate, Members) else candidate.mask).cpu()
    return None


def _order_bytes(masks: Sequence[Tensor]) -> int:
    return plane_bytes(masks[0].numel(), len(masks).bit_length())


def decode(read: Callable[[str], Tensor], names: Sequence[str], level: int) -> Candidate:
    """Return the candidate of a level, on the device of the tensors that `read` gives.

    Args:
        read: Gives the tensor of a name.
        names: The names of all tensors there are.
        level: The level, at least 1.

    Raises:
        ValueError: Tensors are missing or do not fit together. Damage that only shows in values is looked for on the
            CPU alone, as on other devices one would have to wait for them.
    """
    there = frozenset(names)
    own = Stored(read, there, f"{level}.")
    kept, others = own.header("contents", (2,))
    own.check(len(own) == 1 + others, "contents", f"has {others} others, and there are {len(own) - 1}")
    if "dropped" in own:
        own.check(own.header("dropped", (0,)) == () and kept == 0, "contents", f"has {kept} kept of what is dropped")
        return Dropped()
    if "codes" in own:
        return _quantised(own, kept)
    if "kept" in own:
        return _members(own, kept)
    if "mask" in own or "ranks" in own:
        return _weights(own, kept)
    return _ordered(own, Stored(read, there, ""), level, kept)


def _ordered(own: Stored, shared: Stored, level: int, count: int) -> Candidate:
    order, shape = shared.planes("order", (1, 2))
    chosen = unpacked(at_least(order, level), shape)
    shared.check(count <= chosen.numel() and keeps(chosen, count), "order", f"does not keep {count} at level {level}")
    mask = chosen.view(torch.bool)
    return Members(_indices(mask, count), None, _optional(own, "bias", 1)) if mask.dim() == 1 else Weights(mask, None)


def _indices(mask: Tensor, count: int) -> Tensor:
    """Return where a mask (n,) is True, (count,) int64.

    `nonzero` would do the same, but wait for the device to tell how many there are.
    """
    places = torch.where(mask, mask.cumsum(0) - 1, count).clamp_(max=count)  # the last place takes what is not kept
    indices = torch.zeros(count + 1, dtype=torch.int64, device=mask.device)
    return indices.scatter_(0, places, torch.arange(len(mask), device=mask.device))[:count]


def _members(own: Stored, count: int) -> Members:
    kept = own.tensor("kept", (INDEX,), 1)
    own.check(len(kept) == count, "kept", f"has {len(kept)} members, not {count}")
    if _on_cpu(kept) and len(kept):
        own.check(int(kept[0]) >= 0 and bool((kept[1:] > kept[:-1]).all()), "kept", "does not rise from 0 or more")
    weight, bias = _optional(own, "weight", 2), _optional(own, "bias", 1)
    if weight is not None:
        columns = weight.shape[1]
        whole = columns >= count and columns % count == 0 if count else columns == 0
        own.check(whole, "weight", f"has {columns} columns for {count} members")
    if weight is not None and bias is not None:
        own.check(len(bias) == len(weight), "bias", f"has {len(bias)} numbers for {len(weight)} outputs")
    return Members(kept.long(), weight, bias)


def _weights(own: Stored, count: int) -> Weights:
    values = _optional(own, "values", 1)
    own.check(values is None or len(values) == count, "values", f"is not one for each of {count} weights")
    if "ranks" in own:
        ranks, (d_out, groups) = own.planes("ranks", (2,))
        keep, of = own.header("pattern", (2,))
        own.check(len(ranks) == rank_bits(keep, of), "ranks", f"has {len(ranks)} bits for {keep}:{of}")
        own.check(d_out * groups * keep == count, "ranks", f"does not keep {count} weights")
        mask = mask_of(unpacked(ranks, (d_out, groups)), keep, of)
    else:
        bits, shape = own.planes("mask", (2,))
        own.check(len(bits) == 1, "mask", f"has {len(bits)} bits")
        mask = unpacked(bits, shape).view(torch.bool)
        own.check(keeps(mask, count), "mask", f"does not keep {count} weights")
    return Weights(mask, None if values is None else scattered(values, mask))


def _quantised(own: Stored, bits: int) -> Quantised:
    codes, (d_out, groups, size) = own.planes("codes", (3,))
    own.check(len(codes) == bits <= 8, "codes", f"has {len(codes)} bits, not {bits}")
    scale = own.tensor("scale", FLOATS, 2)
    own.check(scale.shape == (d_out, groups), "scale", f"is of shape {tuple(scale.shape)}, not {(d_out, groups)}")
    zero = own.tensor("zero", (torch.uint8,), 2) if "zero" in own else _middle(scale, bits)
    right = zero.shape == scale.shape and (not _on_cpu(zero) or not zero.numel() or int(zero.max()) < 2**bits)
    own.check(right, "zero", f"is not a code of {bits} bits for each group")
    return Quantised(unpacked(codes, (d_out, groups * size)), scale, zero, bits)


def _optional(own: Stored, name: str, dim: int) -> Tensor | None:
    return own.tensor(name, FLOATS, dim) if name in own else None


def _on_cpu(tensor: Tensor) -> bool:
    """Return whether values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"
