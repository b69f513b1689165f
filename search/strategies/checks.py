"""Checks of settings that strategies share.

Each of them raises an InputError that tells the user which setting is wrong, and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from supernet.errors import InputError

# With more than this a search would not end: a generation proposes all of its offspring at once, and a front measures
# all of its points.
MOST = {
    "points": 1_000,
    "offspring": 10_000,
    "candidates": 100_000,
    "exchanges": 10_000,
    "max_exchanges": 10_000,
    "knots": 1_000,
}
MOST |= dict.fromkeys(("generations", "samples", "steps"), 10**6)
MOST_OF_OTHERS = 10**12  # such as tokens, of which a search never takes more than there are


def check_whole(name: str, value: Any, least: int, usual: str | None = None) -> None:
    """Raise an InputError unless a setting is a whole number of at least `least`, and not one that would never end."""
    most = MOST.get(name, MOST_OF_OTHERS)
    if type(value) is not int or value < least:
        advice = f"; {usual} is the usual choice" if usual else ""
        raise InputError(f"strategy.{name}={value} must be a whole number of at least {least}{advice}")
    if value > most:
        raise InputError(f"strategy.{name}={value} must be a whole number of at most {most:,}")


def check_number(name: str, value: Any, lowest: float, highest: float, usual: str) -> None:
    """Raise an InputError unless a setting is a number from `lowest` to `highest`."""
    if type(value) not in (int, float) or not lowest <= value <= highest:
        limits = f"from {lowest:g} to {highest:g}" if math.isfinite(highest) else f"of at least {lowest:g}"
        raise InputError(f"strategy.{name}={value} must be a number {limits}; {usual} is the usual choice")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise an InputError unless a setting is one of these words."""
    if value not in choices:
        raise InputError(f"strategy.{name}={value} is not known; choose one of {', '.join(choices)}")


def check_steps(tokens: Sequence[int], survivors: Sequence[int]) -> None:
    """Raise an InputError unless these describe selection steps, with a number in both lists for each step.

    Args:
        tokens: How many tokens each step measures an allocation on, above 0 and not falling.
        survivors: How many allocations each step keeps, not rising; the last one keeps 1.
    """
    for name, value in (("tokens", tokens), ("survivors", survivors)):
        if not _are_whole(value):
            raise InputError(f"strategy.{name}={value} must be a list of whole numbers, one for each selection step")
    left, spent = list(survivors), list(tokens)
    if not left or len(left) != len(spent) or left[-1] != 1 or min(left) < 1:
        raise InputError(
            f"strategy.survivors={left} must have one number for each of strategy.tokens={spent} and end in 1; for "
            "example survivors=[4,1] tokens=[512,4096]"
        )
    if left != sorted(left, reverse=True) or min(spent) < 1 or spent != sorted(spent):
        raise InputError(
            f"strategy.survivors={left} must not rise, and strategy.tokens={spent} must be above 0 and not fall; for "
            "example survivors=[4,1] tokens=[512,4096]"
        )


def check_tokens(tokens: Sequence[int], single: str, last: str) -> None:
    """Raise an InputError unless these are two numbers of tokens.

    Args:
        tokens: The setting.
        single: What the first number is for, in words for the user.
        last: What the second number is for.
    """
    if not _are_whole(tokens) or len(tokens) != 2 or min(tokens) < 1:
        raise InputError(
            f"strategy.tokens={tokens} must be a list of two whole numbers above 0, of {single} and of {last}; for "
            "example [512,4096]"
        )


def _are_whole(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(number) is int for number in value)
