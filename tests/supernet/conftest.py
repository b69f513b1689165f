"""The definition of pruning, which everything in this folder is compared with, and supernets of every kind."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, member_columns
from supernet.models.architecture import SubBlock, by_query_heads, sub_blocks
from supernet.models.prunables import (
    Pattern,
    Prunable,
    bit_prunables,
    member_prunables,
    presence_prunables,
    weight_prunables,
)
from supernet.space import HEADS, Level, Space, Unit
from supernet.store import Supernet


def silence(part: SubBlock) -> None:
    """Nothing comes out of a sub-block."""
    part.weight(part.column).zero_()
    bias = part.bias(part.column)
    if bias is not None:
        bias.zero_()


def write(part: SubBlock, layer: str, candidate: Candidate) -> None:
    """What is removed counts for nothing."""
    weight = part.weight(layer)
    match candidate:
        case Members():
            assert part.groups is not None
            columns = member_columns(candidate.kept, part.groups.width)
            kept = weight[:, columns].clone() if candidate.weight is None else candidate.weight
            weight.zero_()
            weight[:, columns] = kept
            if candidate.bias is not None:
                part.module.get_submodule(layer).bias = nn.Parameter(candidate.bias)
            if not len(candidate.kept):
                silence(part)
        case Weights():
            weight.copy_(weight * candidate.mask if candidate.weight is None else candidate.weight)
        case Quantised():
            weight.copy_(candidate.weight)
        case Dropped():
            silence(part)


@torch.no_grad()
def model_with_zeros(model: PreTrainedModel, supernet: Supernet, allocation: Sequence[int]) -> PreTrainedModel:
    """A copy of the dense model with an allocation's candidates written into layers of full size."""
    zeroed = copy.deepcopy(model)
    for index, (unit, level) in enumerate(zip(supernet.space.units, allocation, strict=True)):
        if level:
            candidate = supernet.candidate(index, level)
            parts = sub_blocks(zeroed)
            for part in by_query_heads(parts) if unit.kind == HEADS else parts:
                if unit.name in (part.name, part.block_name):
                    write(part, part.column, candidate)
                elif unit.name.startswith(f"{part.name}."):
                    write(part, unit.name.removeprefix(f"{part.name}."), candidate)
    return zeroed


@pytest.fixture(scope="session")
def with_zeros() -> Callable[[PreTrainedModel, Supernet, Sequence[int]], PreTrainedModel]:
    return model_with_zeros


@pytest.fixture
def remote_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers copies to run code from a checkpoint goes with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())


KINDS = ("members", "compensated members", "query heads", "weights", "bits", "sub-blocks", "blocks")


def prunables(model: PreTrainedModel, kind: str) -> tuple[Prunable, ...]:
    parts = sub_blocks(model)
    match kind:
        case "members" | "compensated members" | "query heads":
            return member_prunables(parts, 1, kind == "query heads")
        case "weights":
            return weight_prunables(parts, (Pattern(2, 4), Pattern(1, 4)))
        case "bits":
            return bit_prunables(parts, (4, 2), 16)
        case _:
            return presence_prunables(parts, kind == "blocks")


def draw(part: SubBlock, layer: str, unit: Unit, level: Level, kind: str, generator: torch.Generator) -> Candidate:
    """A candidate that no pruner would choose."""
    weight = part.weight(layer)
    if kind in ("sub-blocks", "blocks"):
        return Dropped()
    if kind == "weights":
        order = torch.rand(weight.shape, generator=generator).flatten().argsort()
        return Weights((order < level.kept).view(weight.shape), None)
    if kind == "bits":
        groups = weight.shape[1] // 16
        codes, zero = (
            torch.randint(2**level.kept, size, generator=generator).byte()
            for size in (weight.shape, (weight.shape[0], groups))
        )
        return Quantised(codes, torch.rand(weight.shape[0], groups, generator=generator) * 0.1, zero, level.kept)
    kept = torch.randperm(unit.total, generator=generator)[: level.kept].sort().values
    bias = torch.randn(weight.shape[0], generator=generator) if kind == "compensated members" else None
    return Members(kept, None, bias)


def thinned(prunable: Prunable) -> tuple[Level, ...]:
    """All members, three quarters and half of them."""
    return tuple(
        Level(count, count * prunable.each) for count in (prunable.total, prunable.total * 3 // 4, prunable.total // 2)
    )


@pytest.fixture(scope="session")
def supernet_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedModel, str], Supernet]:
    """Makes a finished random supernet of a kind (of `KINDS`); members have the levels all, three quarters and half."""

    def make(model: PreTrainedModel, kind: str) -> Supernet:
        generator = torch.Generator().manual_seed(3)
        units = tuple(Unit(p.name, p.kind, p.total, p.choices or thinned(p)) for p in prunables(model, kind))
        supernet = Supernet.open_or_create(tmp_path_factory.mktemp("supernets"), Space(units), {"kind": kind})
        places = {part.name: (part, part.column) for part in sub_blocks(model)}
        places |= {part.block_name: (part, part.column) for part in sub_blocks(model)}
        places |= {f"{part.name}.{n}": (part, n) for part in sub_blocks(model) for stage in part.stages for n in stage}
        for unit in units:
            part, layer = places[unit.name]
            supernet.write(
                unit.name, [draw(part, layer, unit, level, kind, generator) for level in unit.levels[1:]], {}
            )
        return supernet

    return make


D_OUT, D_IN = 5, 12
NUMBERS = torch.arange(D_OUT * D_IN).view(D_OUT, D_IN)


def one_of_each() -> dict[Unit, list[Candidate]]:
    """A tiny unit of every kind with the candidates of its levels behind the dense one."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(D_OUT, D_IN, generator=generator)
    return {
        Unit("0.attention", "attention", 4, (Level(4, 40), Level(2, 20), Level(0, 0))): [
            Members(torch.tensor([1, 3]), values[:, :6].bfloat16(), values[:, 0]),
            Members(torch.arange(0), values[:, :0].bfloat16()),
        ],
        Unit("0.heads", "heads", 4, (Level(4, 40), Level(2, 20), Level(1, 10))): [
            Members(torch.tensor([1, 3]), None),
            Members(torch.tensor([3]), None),
        ],
        Unit("1.chosen", "weights", 60, (Level(60, 60), Level(33, 33), Level(7, 7))): [
            Weights(NUMBERS < 33, None),
            Weights(NUMBERS < 7, None),
        ],
        Unit("1.refitted", "weights", 60, (Level(60, 60), Level(30, 30), Level(13, 13))): [
            Weights(NUMBERS % 2 == 0, values.half() * (NUMBERS % 2 == 0)),
            Weights(NUMBERS < 13, values.half() * (NUMBERS < 13)),
        ],
        Unit("2.bits", "bits", 16, (Level(16, 16 * 60), Level(4, 4 * 60), Level(2, 2 * 60))): [
            Quantised((NUMBERS % 2**bits).byte(), values[:, :3].abs(), torch.ones(D_OUT, 3).byte(), bits)
            for bits in (4, 2)
        ],
        Unit("3", "block", 1, (Level(1, 1), Level(0, 0))): [Dropped()],
    }


@dataclass(frozen=True)
class EachKind:
    """A supernet of all kinds of candidates, and whether what is read of it is what was written."""

    root: Path
    units: dict[Unit, list[Candidate]]

    def open(self, **labels: str) -> Supernet:
        """As a process that starts."""
        return Supernet.open_or_create(self.root, Space(tuple(self.units)), {"model": "a"}, labels)

    def build(self, *names: str, **labels: str) -> Supernet:
        """The units of these names, or all."""
        supernet = self.open(**labels)
        for unit, candidates in self.units.items():
            if unit.name in names or not names:
                supernet.write(unit.name, candidates, {"errors": [0.5] * len(candidates)})
        return supernet

    def read(self, supernet: Supernet, unit: int, level: int) -> None:
        """InputError, or the candidate that was written."""
        expected = list(self.units.values())[unit][level - 1]
        found = supernet.candidate(unit, level)
        assert type(found) is type(expected)
        for name, value in vars(expected).items():
            got = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert got.dtype == value.dtype and torch.equal(got, value), name
            else:
                assert got == value, name

    @property
    def places(self) -> list[tuple[int, int]]:
        """All units and levels."""
        return [(index, level) for index, unit in enumerate(self.units) for level in range(1, len(unit.levels))]


@pytest.fixture
def each_kind(tmp_path: Path) -> EachKind:
    return EachKind(tmp_path / "supernets", one_of_each())
