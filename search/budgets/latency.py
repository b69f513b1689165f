"""What each unit takes at each level, measured on the user's device and kept in the cache for later runs and rounds.

The latency of a model is taken for a rest and a sum over its units. Whole models are timed, because only these have
real caches and real overhead: in each, all units of a class (of one kind and size) keep the same number of members, and
the difference from the dense model, which is timed in turns with it, is shared out among them. The model without any
unit is timed, too, and the units' times are scaled so that they add up, with that rest, to the dense model's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import cast

import numpy as np
import torch
import xxhash
from filelock import FileLock
from transformers import PreTrainedModel

from search.budgets.costs import CostTable
from search.budgets.timing import Request, Seconds, Timer, compare, machine, time_once, warn_if_busy
from search.inputs.data import longest_sequence
from search.paths import cache_dir
from supernet.candidates import Candidate, Dropped, Members
from supernet.errors import InputError
from supernet.models.architecture import SubBlock
from supernet.models.assemble import assemble
from supernet.models.placement import places
from supernet.space import ATTENTION, BLOCK, MIXER, MLP, Level, Space, Unit
from supernet.store import Supernet
from supernet.system.atomic import make_folder, write_atomic

log = logging.getLogger(__name__)

FORMAT = 1

Track = Callable[[Sequence["ModelToTime"], str], Iterable["ModelToTime"]]


@dataclass(frozen=True)
class ModelToTime:
    """A pruned model whose latency is wanted.

    Attributes:
        unit_class: The class whose units are pruned, all alike; "" for all units there are.
        kept: Members that each of them keeps.
    """

    unit_class: str
    kept: int


@dataclass
class UnitClass:
    """Units of one kind and size, which take the same time, and what has been measured of them.

    Attributes:
        units: Their number.
        measured: Seconds that each unit saves, by the members that it keeps, as they came out.
        settled: The same made monotone, once and for all: later points must not move what an allocation costs.
    """

    units: int
    measured: dict[int, Seconds] = field(default_factory=dict)
    settled: dict[int, Seconds] = field(default_factory=dict)


class LatencyTable:
    """The latency of each unit of a model at each level on this machine. What the cache lacks is measured on demand."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: Request,
        device: torch.device,
        dtype: torch.dtype,
        timer: Timer = time_once,
    ) -> None:
        """Open the table in the cache, if there is one. Nothing is measured yet.

        Args:
            model: The dense model; measured where it is at that time.
            request: What is timed.
            device: Where the model will be then.
            dtype: Of the model.
            timer: Times a model.
        """
        longest = longest_sequence(model.config)
        if longest is not None and request.prompt + request.generated > longest:
            raise InputError(
                f"budget.prompt={request.prompt} and budget.generated={request.generated} are more than the {longest} "
                "tokens that the model knows positions for; take fewer"
            )
        self.model, self.request, self.timer = model, request, timer
        shapes = [[name, *parameter.shape] for name, parameter in model.named_parameters()]
        attention = getattr(model.config, "_attn_implementation", None)
        hashed = xxhash.xxh3_64_hexdigest(json.dumps([str(model.config.model_type), attention, shapes]).encode())
        self.key = {
            "model": hashed,
            "dtype": str(dtype),
            "torch": torch.__version__,
            **machine(device),
            **asdict(request),
        }
        name = f"{model.config.model_type}-{xxhash.xxh3_64_hexdigest(json.dumps(self.key).encode())}.json"
        self.path = cache_dir() / "latency" / name
        self.dense: Seconds | None = None
        self.rest: Seconds | None = None  # without any unit
        self.classes: dict[str, UnitClass] = {}
        if self.path.exists():
            self._load()

    def missing(self, space: Space) -> list[ModelToTime]:
        """Return the models that must be timed before the levels of a space have costs.

        First comes the one without any unit; each class also needs the one without any of its own units.
        """
        asked: dict[ModelToTime, None] = {}
        nothing = [ModelToTime("", 0)] if self.rest is None else []
        for name, unit in zip(self._names(space), space.units, strict=True):
            for kept in (0, *(level.kept for level in unit.levels[1:])):
                asked[ModelToTime(name, kept)] = None
        return nothing + [
            wanted
            for wanted in asked
            if wanted.unit_class not in self.classes or wanted.kept not in self.classes[wanted.unit_class].measured
        ]

    def measure(self, space: Space, track: Track) -> None:
        """Time the models that are missing. Each result is written at once, so that a killed run need not repeat it."""
        names = self._names(space)
        for name in dict.fromkeys(names):
            self.classes.setdefault(name, UnitClass(names.count(name)))
        seen: list[float] = []
        for wanted in track(self.missing(space), "latency"):
            units = [
                unit if wanted.unit_class in ("", name) else None for name, unit in zip(names, space.units, strict=True)
            ]
            pruned = assemble(self.model, *sliced(space, units, wanted.kept))
            taken, share = compare(self.model, pruned, self.request, self.timer)
            del pruned
            self.dense = self.dense or taken
            if wanted.unit_class:
                each = self.classes[wanted.unit_class]
                prefill, decode = self.dense.prefill * (1 - share.prefill), self.dense.decode * (1 - share.decode)
                each.measured[wanted.kept] = Seconds(prefill / each.units, decode / each.units)
            else:
                self.rest = Seconds(self.dense.prefill * share.prefill, self.dense.decode * share.decode)
            seen.append(taken.total(self.request))
            self._save()
        warn_if_busy(seen, f"; to measure again, delete {self.path}")
        self._save(settled=True)

    def costs(self, space: Space) -> CostTable:
        """Return the nanoseconds of each level of each unit; everything must have been measured."""
        assert self.dense is not None and self.rest is not None
        names = self._names(space)
        whole, rest = self.dense.total(self.request), self.rest.total(self.request)
        added = sum(self.classes[name].settled[0].total(self.request) for name in names)
        scale = 1e9 * max(0.0, whole - rest) / added if added > 0 else 0.0
        costs = []
        for name, unit in zip(names, space.units, strict=True):
            settled = self.classes[name].settled
            saved = [
                settled[level.kept].total(self.request) if level.kept < unit.total else 0.0 for level in unit.levels
            ]
            costs.append(tuple(round(scale * (settled[0].total(self.request) - seconds)) for seconds in saved))
        return CostTable(tuple(costs), round(1e9 * whole) - sum(row[0] for row in costs))

    def _names(self, space: Space) -> list[str]:
        """Return the name of the class of each unit."""
        words: list[list[str]] = [[f"{unit.kind} of {unit.total}"] for unit in space.units]
        for place in places(self.model, space):
            for index, _ in place.units:
                words[index].append(_shape(place.part, self.model))
        return [", ".join(of_unit) for of_unit in words]

    def _load(self) -> None:
        """Take over what the file has, in place of what this process measured: the file may be in use already."""
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT or content["key"] != self.key:
                raise ValueError
            self.dense = Seconds(**content["dense"])
            self.rest = Seconds(**content["rest"]) if content["rest"] else self.rest
            for name, found in content["classes"].items():
                points = (
                    {int(kept): Seconds(**one) for kept, one in found[which].items()}
                    for which in ("measured", "settled")
                )
                own = self.classes.setdefault(name, UnitClass(int(found["units"])))
                own.measured, own.settled = (
                    {**ours, **its} for ours, its in zip((own.measured, own.settled), points, strict=True)
                )
            numbers = [
                one for each in self.classes.values() for one in (*each.measured.values(), *each.settled.values())
            ]
            numbers += [self.dense] if self.rest is None else [self.dense, self.rest]
            if not all(np.isfinite([one.prefill, one.decode]).all() for one in numbers):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the measured latencies in {self.path} are damaged; delete that file to measure again"
            ) from error

    def _save(self, settled: bool = False) -> None:
        """Write what is known, with what other processes have added to the file meanwhile.

        Args:
            settled: Whether to settle what is new first.
        """
        if self.dense is None:
            return
        make_folder(self.path.parent)
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            with FileLock(lock):
                if self.path.exists():
                    self._load()
                if settled:
                    for each in self.classes.values():
                        settle(each)
                self._write()
        except OSError as error:  # of a folder that is read-only
            raise InputError(f"cannot write {lock}: {error.strerror}; choose another folder for the cache") from error

    def _write(self) -> None:
        assert self.dense is not None
        content = {"format": FORMAT, "date": date.today().isoformat(), "key": self.key, "dense": asdict(self.dense)}
        content["rest"] = asdict(self.rest) if self.rest else None
        content["classes"] = {name: asdict(each) for name, each in self.classes.items()}
        write_atomic(self.path, json.dumps(content, indent=1).encode())


def settle(each: UnitClass) -> None:
    """Make the new measurements of a class monotone: the fewer members stay, the more time is saved.

    What was settled before stays as it is, and bounds what is new.
    """
    for bound in sorted({0, *each.settled}):  # members down to `bound`, up to the next settled number above it
        above = [kept for kept in each.settled if kept > bound]
        top = min(above, default=None)
        new = [
            kept for kept in each.measured if kept not in each.settled and kept >= bound and (top is None or kept < top)
        ]
        new.sort(reverse=True)
        low = Seconds(0.0, 0.0) if top is None else each.settled[top]
        high = each.settled.get(bound, Seconds(float("inf"), float("inf")))
        prefill = np.clip(rising([each.measured[kept].prefill for kept in new]), low.prefill, high.prefill)
        decode = np.clip(rising([each.measured[kept].decode for kept in new]), low.decode, high.decode)
        each.settled |= {kept: Seconds(float(p), float(d)) for kept, p, d in zip(new, prefill, decode, strict=True)}


def rising(values: Sequence[float]) -> list[float]:
    """Return the sequence that never falls and is nearest to `values` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean and number
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [mean for mean, number in pools for _ in range(number)]


def _shape(part: SubBlock, model: PreTrainedModel) -> str:
    """Return, as text, all of a sub-block that its latency depends on."""
    layers = dict.fromkeys(layer for stage in part.stages for layer in stage)
    words = [f"{layer} {'x'.join(map(str, part.weight(layer).shape))}" for layer in layers]
    types = getattr(model.config, "layer_types", None)
    if types and part.kind == ATTENTION:
        words.append(str(types[part.block]))
    return " ".join(words)


@dataclass(frozen=True)
class _Sliced:
    """A stand-in for a supernet, whose candidates are the first members of each unit as they are in the dense model."""

    space: Space

    def candidate(self, unit: int, level: int, device: torch.device) -> Candidate:
        kept = self.space.units[unit].levels[level].kept
        return Members(torch.arange(kept, device=device), None) if kept else Dropped()


def sliced(space: Space, units: Sequence[Unit | None], kept: int) -> tuple[Supernet, tuple[int, ...]]:
    """Return a supernet and an allocation in which some units keep `kept` members and all others are dense."""
    levels = [
        (Level(unit.total, unit.total), *([Level(kept, kept)] if chosen else []))
        for unit, chosen in zip(space.units, units, strict=True)
    ]
    named = zip(space.units, levels, strict=True)
    small = Space(tuple(Unit(unit.name, unit.kind, unit.total, of_unit) for unit, of_unit in named))
    return cast(Supernet, _Sliced(small)), tuple(len(of_unit) - 1 for of_unit in levels)


def check_faster(space: Space, given: str) -> None:
    """InputError for units whose pruned layers take as long as dense ones."""
    if not {unit.kind for unit in space.units} <= {ATTENTION, MLP, MIXER, BLOCK}:
        raise InputError(
            f"{given} is for pruning that makes layers smaller; single weights, query heads and bit widths are as "
            "slow: use prune=obs, another structured method, or prune=depth"
        )
