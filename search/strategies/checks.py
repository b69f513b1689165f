"""Checks of settings that strategies share; what they say is for the user who gave them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from supernet.errors import InputError

# The most that can end: a generation proposes all of its offspring at once, a front measures all of its points.
MOST = {
    "points": 1_000,
    "offspring": 10_000,
    "candidates": 100_000,
    "exchanges": 10_000,
    "max_exchanges": 10_000,
    "knots": 1_000,
}
MOST |= dict.fromkeys(("generations", "samples", "steps"), 10**6)
MOST_OF_OTHERS = 10**12  # tokens, say: what there is of them ends a search anyway


def check_whole(name: str, value: Any, least: int, usual: str | None = None) -> None:
    """InputError unless a setting is a whole number of at least `least`, and not more than can end."""
    most = MOST.get(name, MOST_OF_OTHERS)
    if type(value) is not int or value < least:
        advice = f"; {usual} is the usual choice" if usual else ""
        raise InputError(f"strategy.{name}={value} must be a whole number of at least {least}{advice}")
    if value > most:
        raise InputError(f"strategy.{name}={value} must be a whole number of at most {most:,}")


def check_number(name: str, value: Any, lowest: float, highest: float, usual: str) -> None:
    """InputError unless a setting is a number from `lowest` to `highest`."""
    if type(value) not in (int, float) or not lowest <= value <= highest:
        limits = f"from {lowest:g} to {highest:g}" if math.isfinite(highest) else f"of at least {lowest:g}"
        raise InputError(f"strategy.{name}={value} must be a number {limits}; {usual} is the usual choice")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """InputError unless a setting is one of these words."""
    if value not in choices:
        raise InputError(f"strategy.{name}={value} is not known; choose one of {', '.join(choices)}")


def check_steps(tokens: Sequence[int], survivors: Sequence[int]) -> None:
    """InputError unless these are selection steps."""
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
    """InputError unless these are two numbers of tokens: of one single measurement, and of the last comparison."""
    if not _are_whole(tokens) or len(tokens) != 2 or min(tokens) < 1:
        raise InputError(
            f"strategy.tokens={tokens} must be a list of two whole numbers above 0, of {single} and of {last}; for "
            "example [512,4096]"
        )


def _are_whole(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(number) is int for number in value)
