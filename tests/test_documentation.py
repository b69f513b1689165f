"""The documentation is true where a test can tell: what it names exists, its commands are accepted, lists are whole."""

import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from search.budgets.settings import USUAL as LIMITS_BY_DEFAULT
from search.cli.declared import check_declared
from search.paths import conf_dir
from search.run.settings import check_settings
from tests.search.settings_only import at_work, configured

ROOT = Path(__file__).resolve().parents[1]
CONF = conf_dir()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
}
PACKAGES = ("supernet", "local_prune", "search")
TOP = ("conf", "docs", "tests", *PACKAGES)
WIDTH = 120


def code_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def spans(text: str) -> list[str]:
    """What stands between backticks in running text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong(check: Callable[[str, str], Iterator[str]]) -> list[str]:
    """What a check of (name of the page, its text) finds, over all pages."""
    return [f"{name}: {found}" for name, text in PAGES.items() for found in check(name, text)]


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("search", list(overrides))


def is_setting(key: str) -> bool:
    parent, _, name = key.rpartition(".")
    config = composed("data=local", "data.source.path=text", "tracker=optuna")
    return name in ((OmegaConf.select(config, parent) or {}) if parent else config)


# Pages


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) < 150


def test_no_line_is_too_wide() -> None:
    assert wrong(lambda _, text: (line for line in text.splitlines() if len(line) > WIDTH)) == []


def test_every_link_leads_somewhere() -> None:
    def broken(name: str, text: str) -> Iterator[str]:
        for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
            path, _, anchor = link.partition("#")
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            if not link.startswith("https:") and (
                not target.exists() or (anchor and anchor not in anchors(target.read_text()))
            ):
                yield link

    assert wrong(broken) == []


def test_every_file_module_and_object_that_is_named_exists() -> None:
    def missing(_: str, text: str) -> Iterator[str]:
        for span in spans(text):
            is_path = re.fullmatch(r"[\w./-]+", span) and span.partition("/")[0] in TOP and "/" in span
            is_module = re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", span) and not is_setting(span)
            if (is_path and not (ROOT / span).exists()) or (is_module and locate(span) is None):
                yield span
        for module in re.findall(r"python -m (tests\.[\w.]+)", text):
            if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
                yield module

    assert wrong(missing) == []


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    targets = set(re.findall(r"^([\w./-]+):", makefile, flags=re.MULTILINE))

    def missing(_: str, text: str) -> Iterator[str]:
        named = [line.split()[1] for line in [*code_lines(text), *spans(text)] if re.match(r"make [\w.]", line)]
        yield from (target for target in named if target not in targets)

    assert wrong(missing) == []


def test_every_experiment_is_indexed() -> None:
    names = {path.name for path in (ROOT / "docs/experiments").glob("*.md")} - {"README.md"}
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}-[\w-]+\.md", name) for name in names)
    assert names == set(re.findall(r"\]\(([\w.-]+)\)", PAGES["docs/experiments/README.md"]))


def test_the_tree_in_the_readme_is_the_one_on_disk() -> None:
    lines = code_lines(PAGES["README.md"])
    named, package = set(), ""
    for line in lines[next(number for number, line in enumerate(lines) if line.startswith("conf/")) :]:
        folders = re.findall(r"(?:^|(?<= ))(\w+)/(?= |$)", line)
        if not folders:
            break
        package = package if line.startswith(" ") else folders[0]
        named |= {f"{package}/{folder}" for folder in folders} if line.startswith(" ") else {package}
    there = {f"{package}/{path.parent.name}" for package in PACKAGES for path in (ROOT / package).glob("*/__init__.py")}
    assert named == there | set(TOP)


# Commands and settings


def commands() -> list[str]:
    """Every `python -m search` that a page shows or mentions, once."""
    lines = [line.strip() for text in PAGES.values() for line in [*code_lines(text), *spans(text)]]
    return sorted({line for line in lines if line.startswith("python -m search ")} - {"python -m search --help"})


@pytest.mark.parametrize("command", commands())
def test_every_command_is_accepted(command: str) -> None:
    with at_work():
        for arguments in jobs([one for one in shlex.split(command, comments=True)[3:] if one != "-m"]):
            config = configured(arguments)
            hydra = config.hydra
            with open_dict(config):
                del config["hydra"]
                config.run_name = "run"
            check_declared(config, hydra)
            check_settings(config)


def jobs(arguments: list[str]) -> list[list[str]]:
    """The arguments of each job of a command: several where it sweeps over a setting."""
    sweeps = [one for one in OverridesParser.create().parse_overrides(arguments) if one.is_sweep_override()]
    assert len(sweeps) < 2, "this test has no product of sweeps yet"
    fixed = [one for one in arguments if one not in {sweep.input_line for sweep in sweeps}]
    each = [f"{one.key_or_group}={value}" for one in sweeps for value in one.sweep_string_iterator()]
    return [[*fixed, one] for one in each] or [fixed]


def rows_of_settings() -> dict[str, str]:
    """Name -> default, of the table of settings."""
    lines = [line for line in PAGES["docs/settings.md"].splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1] for cells in (line.strip("| ").split(" | ") for line in lines)}


def test_the_defaults_in_the_table_of_settings_are_true() -> None:
    # Unresolved: what depends on another choice is said in words.
    chosen: Any = OmegaConf.to_container(OmegaConf.load(CONF / "search.yaml").defaults, resolve=False)
    choices = {group: name for entry in chosen if entry != "_self_" for group, name in entry.items()}
    # The files of budgets have null, as other limits may be given.
    usual = choices | {f"budget.{name}": value for name, value in LIMITS_BY_DEFAULT.items()}
    for key, default in rows_of_settings().items():
        assert key in choices or is_setting(key), key
        value, said = usual.get(key, OmegaConf.select(composed(), key)), default.strip("`")
        if value is not None and (default != said or said[0].isdigit()):  # else in words
            assert said in (str(value), str(value).lower(), str(value).removesuffix(".0")), key


def test_the_table_of_settings_is_whole() -> None:
    """But for what belongs to one choice of a group, which has its own file or page."""
    settings = OmegaConf.to_container(composed())
    assert isinstance(settings, dict)
    inner = ("prune", "data", "supernet", "fitness", "evaluator", "evaluate", "export")
    names = {f"{group}.{name}" for group in inner for name in settings[group]}
    names |= {str(name) for name in settings if not (CONF / str(name)).is_dir()}
    assert names - {"prune.pruner", "data.source", "fitness._target_", "export._target_", "run_name"} <= set(
        rows_of_settings()
    )


LISTS = {"prune": "pruners", "strategy": "search", "data": "text", "budget": "budgets", "fitness": "settings"}


@pytest.mark.parametrize(("group", "page"), LISTS.items())
def test_every_choice_is_listed(group: str, page: str) -> None:
    listed = set(re.findall(r"\w+", " ".join(spans(PAGES[f"docs/{page}.md"]))))
    assert {path.stem for path in (CONF / group).glob("*.yaml")} - {"default"} <= listed


def test_every_file_of_settings_says_what_it_is_for() -> None:
    texts = {str(file.relative_to(CONF)): file.read_text() for file in CONF.rglob("*.yaml")}
    assert [name for name, text in texts.items() if not text.startswith("# ")] == []
    assert [name for name, text in texts.items() if any(len(line) > WIDTH for line in text.splitlines())] == []
