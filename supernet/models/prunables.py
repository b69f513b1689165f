"""What can be pruned in a model, before levels are chosen: a `Prunable` for every unit, for each kind of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from supernet.errors import InputError
from supernet.models.architecture import SubBlock, by_query_heads
from supernet.space import ATTENTION, BITS, BLOCK, HEADS, WEIGHTS, Level


@dataclass(frozen=True)
class Prunable:
    """A unit before its levels are chosen.

    Attributes:
        name: Name of the unit, which is that of its sub-block, linear layer or block.
        kind: Kind of the unit, one of those in `supernet.space`.
        total: How many members there are: KV groups, query heads, neurons or weights; the bits of a weight; or 1 for
            what is present or not.
        each: What one member costs.
        added: What a level costs besides, where some members are gone but not all: a bias that makes up for them.
        multiple: The number of members that stay is a multiple of this.
        choices: All levels there are, dense first, where any number of members is not free to stay.
    """

    name: str
    kind: str
    total: int
    each: int
    multiple: int = 1
    choices: tuple[Level, ...] | None = None
    added: int = 0

    def level(self, kept: int) -> Level:
        """The level that keeps this many members."""
        for choice in self.choices or ():
            if choice.kept == kept:
                return choice
        return Level(kept, kept * self.each + (self.added if 0 < kept < self.total else 0))


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` neighbouring inputs of an output, `keep` weights stay."""

    keep: int
    of: int

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern such as "2:4"; InputError for anything else."""
        keep, colon, of = str(text).partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 64):
            raise InputError(
                f"prune.pruner.pattern={text} is not N:M with 0 < N < M <= 64; 2:4 keeps two of every four weights"
            )
        return Pattern(int(keep), int(of))

    def kept(self, weights: int) -> int:
        """How many of a layer's weights stay."""
        return weights // self.of * self.keep


def member_prunables(
    parts: Sequence[SubBlock], multiple: int, query_heads: bool = False, bias: bool = False
) -> tuple[Prunable, ...]:
    """What structured pruning takes: the members of every sub-block that has some.

    Args:
        parts: The model's sub-blocks.
        multiple: Kept neurons are multiples of this.
        query_heads: Take single query heads with their part of the output projection (Týr-the-Pruner) instead of KV
            groups.
        bias: Candidates bring a bias of their own where the projection has none (FLAP).
    """
    found = []
    for part in by_query_heads(parts) if query_heads else parts:
        if part.groups is None:
            continue
        if part.kind != ATTENTION and not 1 <= multiple <= part.groups.members:
            raise InputError(
                f"prune.multiple={multiple} must lie between 1 and the {part.groups.members} neurons of an MLP; 32 "
                "suits most kernels"
            )
        step = 1 if part.kind == ATTENTION else multiple
        kind = HEADS if query_heads and part.kind == ATTENTION else part.kind
        added = len(part.weight(part.column)) if bias and part.bias(part.column) is None else 0
        found.append(Prunable(part.name, kind, part.groups.members, part.member_parameters, step, added=added))
    if not found:
        raise InputError(
            "the model has neither attention nor MLPs to take heads or neurons from; prune its weights or blocks"
        )
    return tuple(found)


def weight_prunables(parts: Sequence[SubBlock], patterns: Sequence[Pattern]) -> tuple[Prunable, ...]:
    """What pruning of weights takes: every linear layer.

    Without patterns a level keeps a multiple of d_out weights, so that rows can keep the same number. With patterns
    every pattern is a level.
    """
    found = []
    for part, layer in _linear_layers(parts):
        d_out, d_in = part.weight(layer).shape
        choices = None
        if patterns:
            for pattern in patterns:
                if d_in % pattern.of:
                    name = f"{pattern.keep}:{pattern.of}"
                    raise InputError(
                        f"prune.pruner.pattern={name} does not divide the {d_in} inputs of {part.name}.{layer}; choose "
                        "another M"
                    )
            counts = sorted({pattern.kept(d_out * d_in) for pattern in patterns} | {d_out * d_in}, reverse=True)
            choices = tuple(Level(count, count) for count in counts)
        found.append(Prunable(f"{part.name}.{layer}", WEIGHTS, d_out * d_in, 1, d_out, choices))
    return tuple(found)


def group_size(d_in: int, group: int) -> int:
    """How many inputs share a scale: the largest divisor of `d_in` that is at most `group`."""
    return next(size for size in range(min(d_in, group), 0, -1) if d_in % size == 0)


def bit_prunables(
    parts: Sequence[SubBlock], bits: Sequence[int], group: int, symmetric: bool = False
) -> tuple[Prunable, ...]:
    """What quantisation takes: every linear layer, whose levels are bit widths and cost bits.

    Args:
        parts: The model's sub-blocks.
        bits: The widths, 2 to 8.
        group: Inputs that share a scale, and a zero of 8 bits, at most (`group_size`).
        symmetric: Whether the zero is the same in all groups and takes no space.
    """
    if not bits or not set(bits) <= set(range(2, 9)):
        raise InputError(f"prune.pruner.bits={list(bits)} must be a list of widths from 2 to 8, such as [8,6,4,3,2]")
    if group < 1:
        raise InputError(f"prune.pruner.group={group} must be at least 1 input; 128 is the usual choice")
    found = []
    for part, layer in _linear_layers(parts):
        weight = part.weight(layer)
        d_out, d_in = weight.shape
        dense = weight.element_size() * 8
        per_group = dense if symmetric else dense + 8
        size = group_size(d_in, group)
        groups = d_out * d_in // size
        levels = [Level(dense, dense * d_out * d_in)]
        levels += [Level(width, width * d_out * d_in + groups * per_group) for width in sorted(set(bits), reverse=True)]
        if levels[1].cost >= levels[0].cost:
            remedy = (
                f"use a larger group that divides {d_in}, or leave out that width"
                if size < d_in
                else "leave out that width"
            )
            raise InputError(
                f"prune.pruner.group={group}: scales of {part.name}.{layer}, one for {size} of its {d_in} inputs, take "
                f"as much as {levels[1].kept} bits save; {remedy}"
            )
        found.append(Prunable(f"{part.name}.{layer}", BITS, dense, d_out * d_in, 1, tuple(levels)))
    return tuple(found)


def presence_prunables(parts: Sequence[SubBlock], whole_blocks: bool) -> tuple[Prunable, ...]:
    """What pruning of depth takes: every sub-block, or every whole block, which is present or dropped."""
    costs: dict[str, tuple[str, int]] = {}
    for part in parts:
        name, kind = (part.block_name, BLOCK) if whole_blocks else (part.name, part.kind)
        costs[name] = kind, costs.get(name, (kind, 0))[1] + part.parameters
    return tuple(
        Prunable(name, kind, 1, cost, 1, (Level(1, cost), Level(0, 0))) for name, (kind, cost) in costs.items()
    )


def _linear_layers(parts: Sequence[SubBlock]) -> list[tuple[SubBlock, str]]:
    return [(part, layer) for part in parts for stage in part.stages for layer in stage]
