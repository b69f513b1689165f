"""Values of settings: what a number, a whole number or a size in bytes must look like.

Whoever owns a setting checks it with these, and the user reads one line that says what would be right.
"""

from __future__ import annotations

import re
from typing import Any

from supernet.errors import InputError


def check_whole(key: str, value: Any, least: int, most: int) -> None:
    """InputError unless the setting `key` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise InputError(f"{key}={value} must be a whole number of at least {least}")
    if value > most:
        raise InputError(f"{key}={value} must be a whole number of at most {most:,}")


def check_number(key: str, value: Any, example: float) -> None:
    """InputError unless the setting `key` is a number; the message gives the example."""
    if type(value) not in (int, float):
        unquoted = " without quotes" if str(value).replace(".", "").isdecimal() else ""
        raise InputError(f"{key}={value} must be a number{unquoted}, such as {example:g}")


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
