"""Types and limits of the settings that the stages read, checked before any work is done.

What a strategy, a pruner or a source of text takes, it checks itself.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from search.budget import check_sparsity
from supernet.errors import InputError

LEAST = {  # whole numbers
    "rounds": 1,
    "seed": 0,
    "data.sequence_length": 2,
    "data.sequences.calibration": 1,
    "data.sequences.search": 1,
    "data.sequences.evaluation": 1,
    "supernet.levels": 2,
    "prune.multiple": 1,
    "prune.batch": 1,
    "fitness.batch": 1,
    "evaluate.batch": 1,
}
NUMBERS = {"budget.sparsity": 0.5, "supernet.step": 0.125}  # with an example
SWITCHES = ("dry_run", "fresh")


def check_settings(config: DictConfig) -> None:
    """InputError for the first setting of a wrong type, or below what makes sense."""
    for key in sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"{key} is not given; add {key}=VALUE to the command")
    for key, least in LEAST.items():
        value = _value(config, key)
        if type(value) is not int or value < least:
            raise InputError(f"{key}={value} must be a whole number of at least {least}")
    for key, example in NUMBERS.items():
        value = _value(config, key)
        if type(value) not in (int, float):
            raise InputError(f"{key}={value} must be a number, such as {example}")
    check_sparsity(config.budget.sparsity)
    for key in SWITCHES:
        value = _value(config, key)
        if type(value) is not bool:
            raise InputError(f"{key}={value} must be true or false")


def _value(config: DictConfig, key: str) -> Any:
    """The value at a dotted key; None where one of the groups on the way is not there."""
    return OmegaConf.select(config, key)
