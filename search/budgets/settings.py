"""The settings `budget.*`: which limits are given, what they may be, and which of them make a difference."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from search.budgets.budget import check_sparsity
from search.values import check_number, check_whole, read_bytes
from supernet.errors import InputError

LIMITS: dict[str, Any] = {  # in the order of their importance, with an example
    "sparsity": 0.5,
    "bits": 4,
    "parameters": 1e9,
    "bytes": "5GB",
    "flops": 1e12,
    "speedup": 1.5,
}
USUAL = {"sparsity": 0.25}  # where no limit is given
DETAILS = {"flops": ("sequence_length",), "speedup": ("batch", "prompt", "generated")}  # what a limit is measured of
RANGES = {  # of these details: the least that makes sense, and the most that can end
    "sequence_length": (1, 1 << 24),
    "batch": (1, 10**6),
    "prompt": (1, 1 << 24),
    "generated": (0, 1 << 24),
}


def given_limits(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The limits that are given, the most important first; the usual one where there is none."""
    return {name: budget[name] for name in LIMITS if budget.get(name) is not None} or dict(USUAL)


def budget_record(budget: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a difference: the limits that are given, and what these are measured of."""
    limits = given_limits(budget)
    return limits | {name: budget[name] for limit in limits for name in DETAILS.get(limit, ()) if name in budget}


def check_budget(budget: Mapping[str, Any]) -> None:
    """InputError for the first setting of a wrong type, or that no model could keep."""
    for name, (least, most) in RANGES.items():
        if name in budget:
            check_whole(f"budget.{name}", budget[name], least, most)
    for name, value in given_limits(budget).items():
        key = f"budget.{name}"
        if name == "bytes":
            read_bytes(key, value)
            continue
        check_number(key, value, LIMITS[name])
        if name == "sparsity":
            check_sparsity(value)
        elif name == "speedup" and not 1.0 < value < float("inf"):
            raise InputError(f"{key}={value} must be above 1; 1.5 makes the model one and a half times as fast")
        elif name in ("parameters", "flops") and not 0 < value < float("inf"):
            raise InputError(
                f"{key}={value} must be finite and above 0, such as {LIMITS[name]:g}; it is of the whole model"
            )


def without_effect(budget: Mapping[str, Any], typed: Collection[str]) -> Iterator[str]:
    """A line for each setting of those `typed` in the command that makes no difference without its limit."""
    limits = given_limits(budget)
    for limit, names in DETAILS.items():
        for name in names:
            if f"budget.{name}" in typed and limit not in limits:
                yield f"budget.{name} has no effect without budget.{limit}"
