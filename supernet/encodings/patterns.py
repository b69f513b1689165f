"""Packs N:M masks: of each group of M neighbours it stores the rank, among all sets of N, of the set that stays.

So a group of 2:4 takes 3 bits and one of 4:8 takes 7, where a mask takes 4 and 8.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb, gcd

import torch
from torch import Tensor

from supernet.encodings.packing import plane_bytes

WIDEST = 64  # the largest M, as a set is a number of M bits while its rank is looked up
SETS = 1 << 16  # the most sets that a group may choose from, as all of them are in a table
PROBED = 64  # how many groups are looked at first: they tell most masks without a pattern from those with one
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rank_bits(keep: int, of: int) -> int:
    """Return how many bits the rank of a group's set takes; ValueError where N:M has no packed form."""
    if not 0 < keep < of <= WIDEST or comb(of, keep) > SETS:
        raise ValueError(f"{keep}:{of} is no pattern of at most {SETS} sets")
    return (comb(of, keep) - 1).bit_length()


def find_pattern(mask: Tensor) -> tuple[int, int] | None:
    """Return N and M such that of every M neighbours exactly N are True, and that ranks take the fewest bytes.

    None says that there are no such numbers, or that a mask takes no more bytes.

    Args:
        mask: (d_out, d_in) bool, on the CPU.
    """
    mask, d_in = mask.contiguous(), mask.shape[1]
    best, least = None, plane_bytes(mask.numel(), 1)
    for of in range(2, min(d_in, WIDEST) + 1):
        if d_in % of or not mask.numel():
            continue
        groups = mask.view(-1, of)
        keep = int(groups[0].sum())
        if not 0 < keep < of or comb(of, keep) > SETS:
            continue
        size = plane_bytes(len(groups), rank_bits(keep, of))
        if size < least and _all_keep(groups[:PROBED], keep) and _all_keep(groups, keep):
            best, least = (keep, of), size
    return best


def ranks_of(mask: Tensor, keep: int, of: int) -> Tensor:
    """Return the ranks of a mask's sets.

    Args:
        mask: (d_out, d_in) bool on the CPU, with `keep` True of every `of` neighbours.

    Returns:
        (d_out, d_in / of) int32.
    """
    _, numbers = _sets(keep, of)
    return torch.searchsorted(numbers, _as_numbers(mask.reshape(-1, of)), out_int32=True).view(len(mask), -1)


def mask_of(ranks: Tensor, keep: int, of: int) -> Tensor:
    """Return the mask (d_out, groups * of) bool that `ranks_of` made these ranks of, on the device of the ranks.

    Args:
        ranks: (d_out, groups) uint8 or int32, below 2 ** rank_bits.
        keep: N, how many weights of a group stay.
        of: M, the size of a group.

    Raises:
        ValueError: A rank is that of no set. This is only checked on the CPU; on other devices such a rank stands for
            the last set, so that N of every M stay in any case.
    """
    if ranks.device.type == "cpu" and ranks.numel() and int(ranks.max()) >= comb(of, keep):
        raise ValueError(f"a group of {keep}:{of} has a rank above {comb(of, keep) - 1}")
    found = _table(keep, of, ranks.device).index_select(0, ranks.flatten().int())
    return found.view(torch.bool).view(len(ranks), -1)


def _all_keep(groups: Tensor, keep: int) -> bool:
    return bool((groups.sum(1, dtype=torch.uint8) == keep).all())


def _as_numbers(groups: Tensor) -> Tensor:
    """Return sets (n, M) bool as numbers (n,) uint8 or int64, whose bits say what is in the set."""
    numbers = torch.zeros(len(groups), dtype=torch.uint8 if groups.shape[1] <= 8 else torch.int64)
    for member in groups.unbind(1):
        numbers.bitwise_left_shift_(1).bitwise_or_(member)
    return numbers


@lru_cache
def _sets(keep: int, of: int) -> tuple[Tensor, Tensor]:
    """Return all sets by rank, (sets, M) bool, and the numbers that stand for them, rising, (sets,)."""
    members = torch.tensor(list(combinations(range(of), keep)))
    sets = torch.zeros(len(members), of, dtype=torch.bool).scatter_(1, members, True)
    numbers, order = _as_numbers(sets).sort()
    return sets[order], numbers


@lru_cache
def _table(keep: int, of: int, device: torch.device) -> Tensor:
    """Return the sets by rank as a few wide words, which are looked up faster: (2 ** bits,) or (2 ** bits, words)."""
    sets, _ = _sets(keep, of)
    ranks = torch.arange(1 << rank_bits(keep, of)).clamp(max=len(sets) - 1)
    return sets[ranks].view(WORDS[gcd(of, 8)]).squeeze(1).to(device)
