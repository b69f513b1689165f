"""Which settings there are: those that the chosen files of `conf` declare, and no others.

What is added with a plus, or by an experiment, and is declared nowhere would be read by nothing; what is taken away
with a tilde is needed by something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydra import compose
from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from search.errors import no_setting
from search.paths import conf_dir
from supernet.errors import InputError

COMPONENTS = {  # what is made of a class by its `_target_`, and how one is chosen
    "model": "model=NAME",
    "data.source": "data=NAME",
    "prune.pruner": "prune=NAME",
    "strategy": "strategy=NAME",
    "fitness": "fitness=NAME",
    "export": "export=NAME",
}


def check_declared(config: DictConfig, hydra: HydraConf) -> None:
    """InputError for the first setting that no chosen file declares, or that a file declares and is not there.

    An experiment may set what its own choices declare and those do not that are made instead of them in the command.

    Args:
        config: As the job gets it.
        hydra: Hydra's own part of it, which knows what was chosen.
    """
    given, known = _plain(config), _plain(_declared(_choices(hydra)))
    typed = {override.partition("=")[0].lstrip("+") for override in hydra.overrides.task}
    strange = dict(_strange(given, known))
    if strange.keys() - typed and hydra.runtime.choices.get("experiment") is not None:
        recipe = compose("search", [f"+experiment={hydra.runtime.choices['experiment']}"], return_hydra_config=True)
        of_recipe = dict(_strange(given, _plain(_declared(_choices(recipe.hydra)))))
        strange = {key: siblings for key, siblings in strange.items() if key in typed or key in of_recipe}
    for key, siblings in strange.items():
        raise InputError(no_setting(key, siblings))
    for key, _ in _strange(known, given):
        typed_so = [
            one for one in hydra.overrides.task if one.startswith("~") and key.startswith(one[1:].partition("=")[0])
        ]
        raise InputError(f"{key} was taken away, but is needed; leave out {next(iter(typed_so), f'~{key}')}")
    for key, choice in COMPONENTS.items():
        component = OmegaConf.select(config, key)
        if not isinstance(component, DictConfig) or "_target_" not in component:
            raise InputError(f"{key}={component} names no component; choose one with {choice}")


def _choices(hydra: HydraConf) -> dict[str, Any]:
    """Return what was chosen of each group. Lists, such as `tracker=[optuna]`, are as they were typed: Hydra keeps
    none.
    """
    typed = (override.partition("=") for override in hydra.overrides.task)
    return {**hydra.runtime.choices, **{key: value for key, _, value in typed if value.startswith("[")}}


def _declared(choices: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of the chosen files, without experiment and overrides."""
    groups = [next(iter(entry)) for entry in OmegaConf.load(conf_dir() / "search.yaml").defaults if entry != "_self_"]
    chosen = [f"{group}={choices[group]}" for group in groups if choices.get(group) is not None]
    return compose("search", chosen)  # by the Hydra that is at work: it knows the folders of --config-dir


def _plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _strange(given: Mapping[str, Any], known: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the keys that only the first mapping has, each with the keys that the second one has beside it."""
    for key, value in given.items():
        if key not in known:
            yield f"{path}{key}", list(known)
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _strange(value, known[key], f"{path}{key}.")
