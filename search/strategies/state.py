"""What a search remembers between generations, and how a checkpoint keeps it.

`State` is what every search remembers; strategies extend it. The functions read a state's values back from a checkpoint
and refuse, with a ValueError, TypeError or KeyError, what no search wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

import numpy as np

from supernet.space import Allocation, Space


@dataclass(frozen=True)
class State:
    """All that a search remembers between two generations.

    A strategy that remembers more has a class of its own, which extends this one. Values are numbers, text, tuples,
    dictionaries and dataclasses of such, so that a state is equal to what is read back after it was written as JSON:
    then a killed run goes on exactly.

    Attributes:
        parent: The best allocation so far.
        fitness: Its fitness when it was last measured; None if it has not been measured yet.
        generation: How many generations have been done.
        tokens: How many tokens were passed through the model; a sequence counts for each allocation measured on it.
        rng: The state of the random generator, numpy's PCG64.
        exhausted: Whether nothing is left to try.
    """

    parent: Allocation
    fitness: float | None
    generation: int
    tokens: int
    rng: dict[str, Any]
    exhausted: bool = False

    @classmethod
    def first(cls, start: Allocation, seed: int) -> Self:
        """Return the state before the first generation of a search that begins at `start`."""
        return cls(start, None, 0, 0, rng_state(np.random.Generator(np.random.PCG64(seed))))

    def generator(self) -> np.random.Generator:
        """Return a random generator that goes on where the last generation left it."""
        bits = np.random.PCG64()
        bits.state = cast(Any, self.rng)
        return np.random.Generator(bits)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary, which the checkpoint writes as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the state that `to_json` wrote; a ValueError, TypeError or KeyError if no search wrote this."""
        if content.keys() != {field.name for field in fields(cls)}:
            raise ValueError("it is not what this strategy remembers")
        state = cls(**cls.values_of(content))
        state.generator()
        return state

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of each field, checked. A state with more fields adds its own to what this returns."""
        fitness = content["fitness"]
        return {
            "parent": read_allocation(content["parent"]),
            "fitness": None if fitness is None else read_number(fitness),
            "generation": read_count(content["generation"]),
            "tokens": read_count(content["tokens"]),
            "rng": dict(content["rng"]),
            "exhausted": read_flag(content["exhausted"]),
        }

    def allocations(self) -> Iterable[Allocation]:
        """Return every allocation that the state holds. A state with more fields adds those in them."""
        return [self.parent]

    def check_levels(self, space: Space) -> None:
        """Raise a ValueError if one of the allocations has levels that this space does not have."""
        most = [len(unit.levels) for unit in space.units]
        for allocation in self.allocations():
            if len(allocation) != len(most) or any(level >= end for level, end in zip(allocation, most, strict=True)):
                raise ValueError("its allocation has levels that there are not")


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """Return the state of a generator as `State.rng` holds it."""
    return cast(dict[str, Any], rng.bit_generator.state)


def read_count(value: Any) -> int:
    """Return a whole number of at least 0; a ValueError for anything else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:50]!r} is no whole number")
    return value


def read_number(value: Any) -> float:
    """Return a number; a TypeError for anything else."""
    if type(value) not in (int, float):
        raise TypeError("a value is of another type than it should be")
    return cast(float, value)


def read_flag(value: Any) -> bool:
    """Return True or False; a TypeError for anything else."""
    if type(value) is not bool:
        raise TypeError("a value is of another type than it should be")
    return value


def read_allocation(value: Any) -> Allocation:
    """Return a list of levels as an allocation."""
    return tuple(map(read_count, value))


def read_losses(value: Mapping[str, Any]) -> dict[int, float]:
    """Return losses by the number of their sequence, which is text in JSON."""
    return {int(sequence): read_number(loss) for sequence, loss in value.items()}
