"""What the command line accepts beyond Hydra's grammar, and clear answers to misspelt choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from supernet.errors import InputError


def accept_any_model(arguments: list[str], conf: Path) -> list[str]:
    """Turn `model=<folder or hub id>` into `model=pretrained model.path=...`; names in conf/model stay as they are."""
    result = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        path = Path(value).expanduser()
        if key == "model" and not _file(conf, "model", value).exists() and "," not in value and ("/" in value or path.is_dir()):
            result += ["model=pretrained", f"model.path='{path}'"]
        else:
            result.append(argument)
    return result


def check_choices(arguments: list[str], conf: Path) -> None:
    """InputError for a choice of a configuration group that does not exist, with the nearest that do."""
    folders = [conf, *_extra_folders(arguments)]
    groups = sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()})
    for group, value in _group_choices(arguments, groups):
        known = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        if value not in known:
            near = difflib.get_close_matches(value, known, n=3, cutoff=0.4) or known
            also = "; or give a folder or a hub id such as org/name" if group == "model" else ""
            raise InputError(f"there is no {group} '{value}'; did you mean {', '.join(near)}?{also}")


def _group_choices(arguments: list[str], groups: list[str]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if equals and key.lstrip("+") in groups and values not in ("null", ""):
            for value in values.split(","):
                yield key.lstrip("+"), value


def _extra_folders(arguments: list[str]) -> Iterator[Path]:
    """Folders given with Hydra's --config-dir."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            yield Path(value if equals else arguments[index + 1] if index + 1 < len(arguments) else "")


def _file(conf: Path, group: str, name: str) -> Path:
    return conf / group / f"{name}.yaml"
