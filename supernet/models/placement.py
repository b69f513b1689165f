"""Where units act: on which sub-block and on which of its layers, and which parameters their candidates replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, member_columns
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.space import HEADS, Space


@dataclass(frozen=True)
class Place:
    """A sub-block and the units that act on it.

    Attributes:
        part: The sub-block.
        units: For each unit its index in the space, and its linear layer; None where it acts on the sub-block as a
            whole.
    """

    part: SubBlock
    units: tuple[tuple[int, str | None], ...]

    def weights(self, candidates: Sequence[Candidate | None]) -> dict[str, Tensor] | None:
        """The module's parameters that differ from the dense ones, by name; None where the sub-block is absent.

        Args:
            candidates: The candidate of each unit, in the order of `units`; None at the dense level.
        """
        return together([self.of_unit(number, candidate) for number, candidate in enumerate(candidates)])

    def of_unit(self, number: int, candidate: Candidate | None) -> dict[str, Tensor] | None:
        """The parameters that differ by the candidate of one unit, `units[number]`; None where nothing is left."""
        if candidate is None:
            return {}
        return None if is_absent(candidate) else parameters(self.part, self.units[number][1], candidate)


def together(of_units: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Unite what each unit of a sub-block changes, parameters by name; None where one of them leaves nothing of it."""
    found: dict[str, Tensor] = {}
    for one in of_units:
        if one is None:
            return None
        found |= one
    return found


def places(model: PreTrainedModel, space: Space) -> tuple[Place, ...]:
    """Every sub-block of the model, in the order of the forward pass, with the units of the space that act on it."""
    index = {unit.name: i for i, unit in enumerate(space.units)}
    found = []
    for part in sub_blocks(model):
        whole = [index[name] for name in (part.block_name, part.name) if name in index]
        if whole and space.units[whole[0]].kind == HEADS:
            part = replace(part, groups=part.query_heads)
        layers = [(index[f"{part.name}.{n}"], n) for stage in part.stages for n in stage if f"{part.name}.{n}" in index]
        found.append(Place(part, (*((unit, None) for unit in whole), *layers)))
    return tuple(found)


def is_absent(candidate: Candidate | None) -> bool:
    """Whether a candidate leaves nothing of its sub-block."""
    return isinstance(candidate, Dropped) or (isinstance(candidate, Members) and not len(candidate.kept))


def parameters(part: SubBlock, layer: str | None, candidate: Candidate) -> dict[str, Tensor]:
    """The parameters that a candidate puts in place of the dense ones, by name; it must leave something."""
    match candidate:
        case Members():
            return sliced(part, candidate) if part.groups and part.groups.slices else zeroed(part, candidate)
        case Weights() | Quantised():
            assert layer is not None
            return part.replaced(layer, full_weight(part, layer, candidate))
        case Dropped():
            raise ValueError(f"{part.name} is dropped and has no parameters")


def full_weight(part: SubBlock, layer: str, candidate: Candidate) -> Tensor:
    """The weight of a linear layer at a candidate, in full size (d_out, d_in): zero where something is removed."""
    dense = part.weight(layer)
    match candidate:
        case Members():
            assert part.groups is not None
            columns = member_columns(candidate.kept.to(dense.device), part.groups.width)
            kept = dense[:, columns] if candidate.weight is None else candidate.weight.to(dense)
            return torch.zeros_like(dense).index_copy_(1, columns, kept)
        case Weights():
            return dense * candidate.mask.to(dense.device) if candidate.weight is None else candidate.weight.to(dense)
        case Quantised():
            return candidate.weight.to(dense)
        case Dropped():
            return torch.zeros_like(dense)


def zeroed(part: SubBlock, candidate: Members) -> dict[str, Tensor]:
    """The last layer of a sub-block in full size, with zeros in the columns of members that are gone."""
    return part.replaced(part.column, full_weight(part, part.column, candidate), candidate.bias)


def cleared(part: SubBlock, members: Sequence[int]) -> dict[str, Tensor]:
    """The other layers of a sub-block in full size, with zeros in the rows of all but these members."""
    assert part.groups is not None
    kept = torch.tensor(members)
    found: dict[str, Tensor] = {}
    for rows in part.groups.rows:
        mask = torch.zeros(part.groups.members * rows.count)
        mask[member_columns(kept, rows.count)] = 1.0
        weight, bias = part.weight(rows.layer).clone(), part.bias(rows.layer)
        ours = slice(rows.offset, rows.offset + len(mask))
        weight[ours] *= mask.to(weight)[:, None]
        if bias is not None:
            bias = bias.clone()
            bias[ours] *= mask.to(bias)
        found |= part.replaced(rows.layer, weight, bias)
    return found


def sliced(part: SubBlock, candidate: Members) -> dict[str, Tensor]:
    """The layers of a sub-block without the rows and columns of members that are gone; at least one must stay.

    Parameters that belong to no member (an output bias, the norms of queries and keys) are left to the module itself.
    """
    assert part.groups is not None
    dense = part.weight(part.column)
    kept = candidate.kept.to(dense.device)
    weight = dense[:, member_columns(kept, part.groups.width)] if candidate.weight is None else candidate.weight
    tensors = part.replaced(part.column, weight, candidate.bias)
    for layer in dict.fromkeys(rows.layer for rows in part.groups.rows):
        sections = [rows for rows in part.groups.rows if rows.layer == layer]
        index = torch.cat([rows.offset + member_columns(kept, rows.count) for rows in sections])
        bias = part.bias(layer)
        tensors |= part.replaced(layer, part.weight(layer)[index], None if bias is None else bias[index])
    return tensors
