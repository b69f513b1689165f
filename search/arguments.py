"""What the command line accepts beyond Hydra's grammar, and clear answers to misspelt choices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from search.errors import nearest
from supernet.errors import InputError


def accept_any_model(arguments: list[str], conf: Path) -> list[str]:
    """Turn `model=<folder or hub id>` into `model=pretrained model.path=...`; names in conf/model stay as they are."""
    result = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        known = (conf / "model" / f"{value}.yaml").exists()
        if key == "model" and not known and "," not in value and ("/" in value or Path(value).expanduser().is_dir()):
            quoted = value.replace("'", r"\'")
            result += ["model=pretrained", f"model.path='{quoted}'"]
        else:
            result.append(argument)
    return result


def check_choices(arguments: list[str], conf: Path) -> None:
    """InputError for a choice of a configuration group that does not exist, with the nearest that do."""
    folders = [conf, *_extra_folders(arguments)]
    groups = sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()})
    _check_additions(arguments, groups)
    for group, value in _group_choices(arguments, groups):
        known = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        if value not in known:
            also = " A folder or a hub id such as org/name will do, too." if group == "model" else ""
            raise InputError(f"there is no {group} '{value}'; did you mean {nearest(value, known)}?{also}")


def _check_additions(arguments: list[str], groups: list[str]) -> None:
    """InputError for `+experment=demo`: Hydra takes it for a new setting, and the default job would run instead."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if key == "experiment":
            raise InputError(f"'{argument}' needs a plus, as it adds to the defaults: +{argument}")
        if key.startswith("+") and key.strip("+").isidentifier() and key.strip("+") not in groups:
            raise InputError(
                f"there is nothing called {key.strip('+')} to choose; did you mean +{nearest(key.strip('+'), groups)}?"
            )


def _group_choices(arguments: list[str], groups: list[str]) -> Iterator[tuple[str, str]]:
    """Group and value of each choice, those of a sweep one by one; functions such as glob(*) are left to Hydra."""
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if equals and key.lstrip("+") in groups and "(" not in values:
            for value in values.split(","):
                yield key.lstrip("+"), value


def _extra_folders(arguments: list[str]) -> Iterator[Path]:
    """Folders given with Hydra's --config-dir."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            yield Path(value if equals else arguments[index + 1] if index + 1 < len(arguments) else "")
