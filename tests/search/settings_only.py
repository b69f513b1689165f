"""What the command line says of its settings, without a run: some milliseconds a command, where Hydra takes a third of
a second.

A configuration is composed once for each choice of groups; what is set besides is laid over a copy of it by Hydra's own
code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from search.cli import declared
from search.cli.arguments import check_choices, prepared
from search.cli.declared import check_declared
from search.errors import explained
from search.inputs.models import random_llama
from search.paths import conf_dir
from search.run.pipeline import run

GROUPS = frozenset(path.name for path in conf_dir().iterdir() if path.is_dir())


@contextmanager
def at_work() -> Iterator[None]:
    """Hydra, as it is while a job runs. The model and what each choice of groups declares are made once."""
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        patch.setattr(declared, "_declared", lambda choices: _declared(tuple(choices.items())))
        patch.setattr("search.inputs.models.random_llama", _random_llama)
        yield


_random_llama = cache(random_llama)
_of_choices = declared._declared


@cache
def _declared(choices: tuple[tuple[str, Any], ...]) -> DictConfig:
    return _of_choices(dict(choices))


@cache
def composed(choices: tuple[str, ...]) -> DictConfig:
    """The configuration of these choices of groups; not to be changed."""
    return compose("search", list(choices), return_hydra_config=True)


def configured(arguments: Sequence[str]) -> DictConfig:
    """The configuration of a command, with Hydra's own part."""
    given = prepared(arguments, conf_dir())
    check_choices(given, conf_dir())
    overrides = OverridesParser.create().parse_overrides(given)
    config = deepcopy(composed(tuple(str(one.input_line) for one in overrides if _is_choice(one))))
    values = [one for one in overrides if not _is_choice(one)]
    with open_dict(config.hydra):
        config.hydra.overrides.task = [str(one.input_line) for one in overrides]
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


def _is_choice(override: Override) -> bool:
    return override.key_or_group in GROUPS and override.value_type is not None and not override.is_delete()


def answer(arguments: Sequence[str], folder: Path) -> str | None:
    """What is said to a command that must not run, after `error: `; None where nothing is wrong with it."""
    try:
        config = configured(arguments)
        hydra = config.hydra
        with open_dict(config):
            del config["hydra"]
        check_declared(config, hydra)
        if config.get("dry_run") is False:
            config.dry_run = True
        run(config, folder, [override.partition("=")[0].lstrip("+") for override in hydra.overrides.task])
    except Exception as error:
        line = explained(error)
        assert line is not None, f"a traceback: {error!r}"
        assert "\n" not in line
        return line
    return None
