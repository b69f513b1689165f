"""Every file of the configuration composes, names what exists, and travels with the wheel."""

import importlib.util
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from search.paths import CACHE_VARIABLE, cache_dir, conf_dir
from search.run.settings import check_settings

ROOT = Path(__file__).resolve().parents[2]
CONF = conf_dir()  # here, as parameters are made before fixtures
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("search", list(overrides), return_hydra_config=True)


def targets(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `_target_`, however deep."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from targets(inner)


def without_hydra(config: DictConfig) -> dict[str, Any]:
    settings = OmegaConf.to_container(config)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items() if key != "hydra"}


def test_a_checkout_uses_its_own_conf() -> None:
    assert CONF == ROOT / "conf"
    assert {"demo", "llama_50pct", "smoke"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_its_parts_accept_its_settings(name: str) -> None:
    config = composed(f"+experiment={name}")
    config.hydra.runtime.choices = {"experiment": name}  # what Hydra notes in a real run
    assert config.run_name == name
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.run_name = name  # as in a run, where Hydra's own part is resolved and taken away
    del config["hydra"]
    check_settings(config)
    for part in (config.strategy, config.prune.pruner, config.data.source):
        instantiate(part)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_starts_with_the_command_that_runs_it(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[:2] == ["# @package _global_", f"# python -m search +experiment={name}"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_only_sets_what_the_groups_it_takes_have(name: str) -> None:
    """A misspelt key in an experiment would be a new setting that nothing reads."""
    recipe = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    choices = [f"{key.removeprefix('override /')}={value}" for entry in recipe.defaults for key, value in entry.items()]
    known = without_hydra(composed(*choices))
    del recipe["defaults"]

    def unknown(given: Any, there: Any, path: str) -> list[str]:
        if not isinstance(given, dict):
            return []
        if not isinstance(there, dict):
            return [path]
        missing = [f"{path}{key}" for key in given if key not in there]
        return missing + [
            key for name in given if name in there for key in unknown(given[name], there[name], f"{path}{name}.")
        ]

    assert unknown(OmegaConf.to_container(recipe), known, "") == []


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_choice_composes_and_its_targets_accept_its_keys(choice: Path) -> None:
    config = without_hydra(composed(f"{choice.parent}={choice.stem}"))
    for target in targets(config[choice.parent.name]):
        keys = set(target) - {"_target_"}
        given = keys | ({"dtype"} if choice.parent.name == "model" else set())  # the job adds the run's dtype
        inspect.signature(get_object(target["_target_"])).bind(**dict.fromkeys(given))


@pytest.mark.parametrize("choice", sorted(path.stem for path in CONF.glob("prune/*.yaml")))
def test_every_setting_of_a_pruner_is_written_out(choice: str) -> None:
    """Else `--cfg job` would not show it, and to set it would take a plus sign."""
    pruner = without_hydra(composed(f"prune={choice}"))["prune"]["pruner"]
    assert set(pruner) - {"_target_"} == {field.name for field in fields(get_object(pruner["_target_"]))}


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_dir() == Path("~/.cache/sparsity-search").expanduser()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds wheels, is not installed"
)
def test_the_wheel_carries_the_configuration(tmp_path: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT], check=True, timeout=120
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped, ours = tmp_path / "site/search/_conf", {file.relative_to(CONF) for file in CONF.rglob("*.yaml")}
    assert {file.relative_to(shipped) for file in shipped.rglob("*.yaml")} == ours
    found = subprocess.run(
        [sys.executable, "-c", "from search.paths import conf_dir; print(conf_dir())"],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == shipped
