"""What the command line accepts beyond Hydra's grammar, and clear answers to misspelt choices.

Hydra wants flags before settings, and quotes within quotes around a value with a comma, a blank or a letter beyond
ASCII. People type paths as their shell completes them, and flags where they think of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from search.errors import nearest
from supernet.errors import InputError

PATHS = (  # settings that hold a path
    "model.path",
    "data.source.path",
    "data.source.evaluation_path",
    "supernet.root",
    "strategy.file",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
FLAGS = (  # Hydra's
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
)
VALUED = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p"),
    "--experimental-rerun",
)
CONFIG_DIRS = ("--config-dir", "-cd")


def prepared(arguments: Sequence[str], conf: Path) -> list[str]:
    """Return the arguments as Hydra wants them: flags first, paths quoted, and a model's folder or hub id as
    `model.path`.
    """
    flags, settings = _parted(arguments)
    sweep = "-m" in flags or "--multirun" in flags
    models = _names([conf, *_extra_folders(flags)], "model")
    found = list(flags)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if equals and not key.strip("+~"):
            raise InputError(f"'{setting}' has no name before the equals sign; write key=value")
        if not equals and not key.startswith("~"):
            raise InputError(f"'{setting}' has no equals sign; write key=value, without blanks around it")
        if key == "model" and equals:
            found += _model(value, models, sweep)
        elif key.lstrip("+") in PATHS and equals:
            found.append(f"{key}={_paths(value, sweep)}")
        else:
            found.append(setting)
    return _of_this_machine(found)


def _of_this_machine(settings: list[str]) -> list[str]:
    """The same settings with `model=folder` for `model=pretrained`, where the path is a folder: its text is another."""
    given = [setting.partition("=")[2] for setting in settings if setting.lstrip("+").startswith("model.path=")]
    paths = [_unquoted(one) for value in given for one in (value, *_elements(value))]
    local = any(os.path.isdir(os.path.expanduser(path)) for path in paths)
    return ["model=folder" if local and setting == "model=pretrained" else setting for setting in settings]


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the arguments into flags, with their values, and settings."""
    flags, settings, rest = list[str](), list[str](), list(arguments)
    while rest:
        one = rest.pop(0)
        name, equals, _ = one.partition("=")
        if not one.startswith("-"):
            settings.append(one)
        elif name in VALUED and (equals or rest):
            flags += [one] if equals else [one, rest.pop(0)]
        elif one in FLAGS or (name in ("--info", "-i") and equals):
            flags.append(one)
        else:
            if equals and "." in name:
                raise InputError(f"{one} is a setting and needs no dashes: {one.lstrip('-')}")
            lacks = (
                "needs a value" if name in VALUED else f"is no flag; did you mean {nearest(name, [*FLAGS, *VALUED])}?"
            )
            raise InputError(f"{one} {lacks}; settings have no dashes: key=value")
    return flags, settings


def _model(value: str, known: set[str], sweep: bool) -> list[str]:
    """Return the choice of a model: by name as it is, a folder or hub id as the model that is loaded from there."""
    plain = _unquoted(value)
    each = (
        [_unquoted(one) for one in _elements(value)]
        if sweep and not os.path.exists(os.path.expanduser(plain))
        else [plain]
    )
    are_paths = [one not in known and ("/" in one or os.path.isdir(os.path.expanduser(one))) for one in each]
    if not any(are_paths):
        return [f"model={value}"]
    if not all(are_paths):
        named = ", ".join(one for one, is_path in zip(each, are_paths, strict=True) if not is_path)
        raise InputError(
            f"model={value}: a sweep is over names or over folders and hub ids; leave out {named}, or the others"
        )
    return ["model=pretrained", f"model.path={','.join(map(_quoted, each))}"]


def _paths(value: str, sweep: bool) -> str:
    """Return a path in quotes, or several of a sweep; null and what holds an interpolation stay as they are."""
    if value == "null" or "${" in value or not value:
        return value
    plain = _unquoted(value)
    if sweep and not os.path.exists(os.path.expanduser(plain)):
        return ",".join(_quoted(_unquoted(one)) for one in _elements(value))
    return _quoted(plain)


def _elements(value: str) -> list[str]:
    """Part the value of a sweep at the commas that stand outside quotes."""
    return [found for found in re.findall(r"""((?:'[^']*'|"[^"]*"|[^,])*)(?:,|$)""", value) if found] or [value]


def _unquoted(value: str) -> str:
    """Return a value without the quotes that Hydra would take away."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(f"\\{value[0]}", value[0])
    return value


def _quoted(value: str) -> str:
    """Return a value in quotes for Hydra, where a backslash counts only before a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    backslashes = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{backslashes * chr(92)}'"


def check_choices(arguments: Sequence[str], conf: Path) -> None:
    """InputError for a choice of a configuration group that does not exist, with the nearest that do."""
    folders = [conf, *_extra_folders(arguments)]
    groups = sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()})
    _check_additions(arguments, groups)
    for group, value in _group_choices(arguments, groups):
        known = _names(folders, group)
        if value not in known:
            also = " A folder or a hub id such as org/name will do, too." if group == "model" else ""
            raise InputError(f"there is no {group} '{value}'; did you mean {nearest(value, known)}?{also}")


def _names(folders: Sequence[Path], group: str) -> set[str]:
    """Return the names that can be chosen of a configuration group."""
    return {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}


def _check_additions(arguments: Sequence[str], groups: Sequence[str]) -> None:
    """InputError for `+experment=demo`: Hydra takes it for a new setting, and the default job would run instead."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if key == "experiment":
            raise InputError(f"'{argument}' needs a plus, as it adds to the defaults: +{argument}")
        if key.startswith("+") and key.strip("+").isidentifier() and key.strip("+") not in groups:
            raise InputError(
                f"there is nothing called {key.strip('+')} to choose; did you mean +{nearest(key.strip('+'), groups)}?"
            )


def _group_choices(arguments: Sequence[str], groups: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the group and value of each choice, those of a list or a sweep one by one.

    Values that are functions, such as glob(*), are left to Hydra.
    """
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if equals and key.lstrip("+") in groups and "(" not in values:
            for value in values.strip("[]").split(","):
                yield key.lstrip("+"), value.strip()


def _extra_folders(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the folders given with Hydra's --config-dir."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in CONFIG_DIRS:
            yield Path(value if equals else arguments[index + 1] if index + 1 < len(arguments) else "")
