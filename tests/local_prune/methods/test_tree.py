"""Where is the formula of a method? In the file that has the name by which `prune=` chooses it."""

from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import yaml

import local_prune.methods
from search.paths import conf_dir

CHOICES = {path.stem: path for path in sorted((conf_dir() / "prune").glob("*.yaml"))}
FILES = {path.stem for path in Path(local_prune.methods.__path__[0]).glob("*.py")} - {"__init__"}


def test_every_file_is_a_method_that_can_be_chosen() -> None:
    assert set(CHOICES) == FILES


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_in_the_file_of_its_name_and_says_whose_method_it_is(choice: str) -> None:
    target = yaml.safe_load(CHOICES[choice].read_text())["pruner"]["_target_"]
    pruner: Any = locate(target)
    assert pruner.__module__ == f"local_prune.methods.{choice}"
    assert pruner.name == choice and f"`prune={choice}`" in pruner.__doc__
