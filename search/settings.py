"""Types and limits of the settings that the stages read, checked before any work is done.

What a strategy, a pruner or a source of text takes, it checks itself, but for the types that a pruner's class names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pydoc import locate
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
    "supernet.levels": 2,
    "evaluate.batch": 1,
}
NUMBERS = {"supernet.step": 0.125, "supernet.lowest": 0.0}  # with an example
LIMITS = {  # budgets, in the order of their importance, with an example
    "sparsity": 0.5,
    "bits": 4,
    "parameters": 1e9,
    "bytes": "5GB",
    "flops": 1e12,
    "speedup": 1.5,
}
USUAL = {"sparsity": 0.25}  # where none is given
OF = {"flops": ("sequence_length",), "speedup": ("batch", "prompt", "generated")}  # settings that some of them take
REQUEST = {"sequence_length": 1, "batch": 1, "prompt": 1, "generated": 0}  # of budgets; whole numbers
SWITCHES = ("dry_run", "fresh", "export.check")
TYPES: dict[str, tuple[tuple[type, ...], str]] = {  # of a dataclass's attributes: what a value may be, and that in words
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


def check_settings(config: DictConfig) -> None:
    """InputError for the first setting of a wrong type, or below what makes sense."""
    for key in sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"{key} is not given; add {key}=VALUE to the command")
    for key, least in LEAST.items():
        _check_whole(config, key, least)
    if _value(config, "data.sequences.evaluation") != "all":
        _check_whole(config, "data.sequences.evaluation", 1)
    for name in ("batch", "multiple"):  # not every method has them
        if name in config.prune:
            _check_whole(config, f"prune.{name}", 1)
    for key, example in NUMBERS.items():
        _check_number(key, _value(config, key), example)
    _check_budget(config)
    for key in SWITCHES:
        value = _value(config, key)
        if type(value) is not bool:
            raise InputError(f"{key}={value} must be true or false")
    study = _value(config, "study")
    if study is not None and (type(study) is not str or not study):
        raise InputError(f"study={study} must be a file such as trials.log, a database such as sqlite:///trials.db, or null")


def _check_budget(config: DictConfig) -> None:
    for name, least in REQUEST.items():
        if name in config.budget:
            _check_whole(config, f"budget.{name}", least)
    for name, value in given_limits(config.budget).items():
        key = f"budget.{name}"
        if name == "bytes":
            read_bytes(key, value)
            continue
        _check_number(key, value, LIMITS[name])
        if name == "sparsity":
            check_sparsity(value)
        elif name == "speedup" and not 1.0 < value < float("inf"):
            raise InputError(f"{key}={value} must be above 1; 1.5 makes the model one and a half times as fast")
        elif name in ("parameters", "flops") and not 0 < value < float("inf"):
            raise InputError(f"{key}={value} must be finite and above 0, such as {LIMITS[name]:g}; it is of the whole model")


def given_limits(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The limits that are given, the most important first; the usual one where there is none."""
    return {name: budget[name] for name in LIMITS if budget.get(name) is not None} or dict(USUAL)


def budget_record(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a difference: limits, and what goes with them."""
    limits = given_limits(budget)
    return limits | {name: budget[name] for limit in limits for name in OF.get(limit, ()) if name in budget}


def check_types(config: DictConfig, key: str) -> None:
    """InputError for a value of the component at `key` that is not what its dataclass says: Python itself would take any."""
    component = OmegaConf.select(config, key)
    target = locate(str(component.get("_target_")))
    for field in fields(target) if isinstance(target, type) and is_dataclass(target) else ():
        kinds, words = TYPES.get(getattr(field.type, "__name__", str(field.type)), ((), ""))
        if kinds and field.name in component and type(value := component[field.name]) not in kinds:
            raise InputError(f"{key}.{field.name}={value} must be {words}")


def read_bytes(key: str, value: Any) -> int | None:
    """A size in bytes: a whole number, or one with a unit ("4GB", "512 MiB"); None stays None."""
    if value is None or (type(value) is int and value >= 0):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT])(i?)B", str(value))
    if not found:
        raise InputError(
            f"{key}={value} is not a size; use a number of bytes, or one with a unit (kB to TB, KiB to TiB) such as 4GB or 512MiB"
        )
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def _check_number(key: str, value: Any, example: Any) -> None:
    if type(value) not in (int, float):
        raise InputError(f"{key}={value} must be a number, such as {example:g}")


def _check_whole(config: DictConfig, key: str, least: int) -> None:
    value = _value(config, key)
    if type(value) is not int or value < least:
        raise InputError(f"{key}={value} must be a whole number of at least {least}")


def _value(config: DictConfig, key: str) -> Any:
    """The value at a dotted key; None where one of the groups on the way is not there."""
    return OmegaConf.select(config, key)
