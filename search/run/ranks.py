"""The processes of a run, and this one among them: rank, number, device, and the words and values that they share.

Nothing else in the project asks how many processes there are. Today there is one: a start by torchrun with more is
refused, instead of doing the same work several times over one directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from supernet.errors import InputError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a run.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local: Its number among those on the same machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """The ranks that torchrun told this process in RANK, WORLD_SIZE and LOCAL_RANK; one process without them.

        Raises:
            InputError: There is more than one process, a variable is no number, or a rank is not below their number.
        """
        found = {}
        for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            text = environment.get(name, usual)
            if not text.isdecimal():
                raise InputError(f"the environment variable {name}={text} is no number; unset it, or use torchrun")
            found[name] = int(text)
        if found["WORLD_SIZE"] != 1:
            raise InputError(
                f"WORLD_SIZE={found['WORLD_SIZE']}: a run works in one process; start it without torchrun, as "
                "python -m search, and unset WORLD_SIZE"
            )
        for name in ("RANK", "LOCAL_RANK"):
            if found[name] >= found["WORLD_SIZE"]:
                raise InputError(f"{name}={found[name]} is not below WORLD_SIZE={found['WORLD_SIZE']}; unset {name}")
        return cls(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"])

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes the run's directory and speaks to the user."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: `auto` is its own GPU if there is one, else the CPU.

        Raises:
            InputError: There is no such device.
        """
        if name == "auto":
            name = f"cuda:{self.local}" if self.world > 1 else "cuda"
            name = name if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0].partition(". ")[0]
            why = why if len(why) < 100 else "torch knows no such device here"
            raise InputError(
                f"device={name} cannot be used here ({why}); use device=cpu, or cuda with a GPU"
            ) from error
        return torch.device(name)

    def log_once(self, logger: logging.Logger, message: str, *arguments: object, level: int = logging.INFO) -> None:
        """Log a line from the first process alone."""
        if self.is_first:
            logger.log(level, message, *arguments)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks, in each of them."""
        return [value]
