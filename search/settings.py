"""Types and limits of the settings that the stages read, checked before any work is done.

What a strategy, a pruner or a source of text takes, it checks itself, but for the types that a pruner's class names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pydoc import locate
from typing import Any

from omegaconf import DictConfig, OmegaConf

from search.budgets.budget import check_sparsity
from supernet.errors import InputError

# Whole numbers: the least that makes sense, and the most that can end: more would hang, or take all memory, before
# anything else could object.
WHOLE = {
    "rounds": (1, 16),  # each halves the spacing of levels: of 0.125 nothing is left after so many
    "seed": (0, 2**63 - 1),
    "data.sequence_length": (2, 1 << 24),
    "data.sequences.calibration": (1, 10**7),
    "data.sequences.search": (1, 10**7),
    "supernet.levels": (2, 4097),
    "evaluate.batch": (1, 10**6),
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
REQUEST = {  # of budgets; whole numbers
    "sequence_length": (1, 1 << 24),
    "batch": (1, 10**6),
    "prompt": (1, 1 << 24),
    "generated": (0, 1 << 24),
}
TEXTS = {"device": "a device such as auto, cpu or cuda:1", "dtype": "auto, bfloat16, float16 or float32"}
SWITCHES = ("dry_run", "fresh", "export.check")
TYPES: dict[
    str, tuple[tuple[type, ...], str]
] = {  # of a dataclass's attributes: what a value may be, and that in words
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


def check_settings(config: DictConfig) -> None:
    """InputError for the first setting of a wrong type, or below what makes sense."""
    for key in sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"{key} is not given; add {key}=VALUE to the command")
    if not isinstance(config.data.sequences, DictConfig):
        parts = "{calibration: 64, search: 64, evaluation: 32}"
        raise InputError(
            f"data.sequences={config.data.sequences} must say how many each part gets: 'data.sequences={parts}'"
        )
    for key, (least, most) in WHOLE.items():
        _check_whole(config, key, least, most)
    if _value(config, "data.sequences.evaluation") != "all":
        _check_whole(config, "data.sequences.evaluation", *WHOLE["data.sequences.search"])
    for name in ("batch", "multiple"):  # not every method has them
        if name in config.prune:
            _check_whole(config, f"prune.{name}", 1, 10**6)
    _check_texts(config)
    for key, example in NUMBERS.items():
        _check_number(key, _value(config, key), example)
    _check_budget(config)
    for key in SWITCHES:
        value = _value(config, key)
        if type(value) is not bool:
            raise InputError(f"{key}={value} must be true or false")
    study = _value(config, "study")
    if study is not None and (type(study) is not str or not study):
        raise InputError(
            f"study={study} must be a file such as trials.log, a database such as sqlite:///trials.db, or null"
        )


def _check_budget(config: DictConfig) -> None:
    for name, (least, most) in REQUEST.items():
        if name in config.budget:
            _check_whole(config, f"budget.{name}", least, most)
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
            raise InputError(
                f"{key}={value} must be finite and above 0, such as {LIMITS[name]:g}; it is of the whole model"
            )


def without_effect(config: DictConfig, typed: Collection[str]) -> Iterator[str]:
    """What was typed in the command and makes no difference, with the reason: known from the settings alone."""
    limits = given_limits(config.budget)
    reasons = {f"budget.{name}": f"budget.{limit}" for limit, names in OF.items() for name in names}
    for key, limit in reasons.items():
        if key in typed and limit.removeprefix("budget.") not in limits:
            yield f"{key} has no effect without {limit}"
    if "evaluate.batch" in typed and config.evaluator.resident == "blocks":
        streamed = "evaluator.resident=blocks, where text moves through the model as memory allows"
        yield f"evaluate.batch has no effect with {streamed}"


def given_limits(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The limits that are given, the most important first; the usual one where there is none."""
    return {name: budget[name] for name in LIMITS if budget.get(name) is not None} or dict(USUAL)


def budget_record(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a difference: limits, and what goes with them."""
    limits = given_limits(budget)
    return limits | {name: budget[name] for limit in limits for name in OF.get(limit, ()) if name in budget}


def check_types(config: DictConfig, key: str) -> None:
    """InputError for a value of the component at `key` that is not what its dataclass says: Python itself would take
    any.
    """
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
            f"{key}={value} is not a size; use a number of bytes, or one with a unit (kB to TB, KiB to TiB) such as "
            "4GB or 512MiB"
        )
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def _check_number(key: str, value: Any, example: Any) -> None:
    if type(value) not in (int, float):
        unquoted = " without quotes" if str(value).replace(".", "").isdecimal() else ""
        raise InputError(f"{key}={value} must be a number{unquoted}, such as {example:g}")


def _check_whole(config: DictConfig, key: str, least: int, most: int) -> None:
    value = _value(config, key)
    if type(value) is not int or value < least:
        raise InputError(f"{key}={value} must be a whole number of at least {least}")
    if value > most:
        raise InputError(f"{key}={value} must be a whole number of at most {most:,}")


def _check_texts(config: DictConfig) -> None:
    """InputError for what should be a word or a path and is not."""
    for key, example in TEXTS.items():
        value = _value(config, key)
        if type(value) is not str or not value:
            raise InputError(f"{key}={value} must be {example}")
    root = _value(config, "supernet.root")
    if root is not None and (type(root) is not str or not root):
        raise InputError(f"supernet.root={root} must be a folder, or null for the cache")


def _value(config: DictConfig, key: str) -> Any:
    """The value at a dotted key; None where one of the groups on the way is not there."""
    return OmegaConf.select(config, key)
