"""What is recorded of a component does not change with the place of its class, and does change with what it does."""

import sys
from types import ModuleType

import pytest

import search
from local_prune.methods.obs import ObsPruner
from search.run.recorded import recorded
from search.strategies.evolution.evopress import EvoPress


def test_a_class_that_moves_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = ModuleType("search.elsewhere")
    moved.EvoPress, moved.Obs2 = EvoPress, ObsPruner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "search.elsewhere", moved)
    monkeypatch.setattr(search, "elsewhere", moved, raising=False)
    paths = ("search.strategies.evolution.evopress.EvoPress", "search.elsewhere.EvoPress")
    here, there = ({"strategy": {"_target_": path, "offspring": 8}} for path in paths)
    assert recorded(here) == recorded(there) == {"strategy": {"_target_": "EvoPress", "offspring": 8}}
    pruners = ("local_prune.methods.obs.ObsPruner", "search.elsewhere.Obs2")
    found = [recorded({"prune": {"pruner": {"_target_": path}}})["prune"]["pruner"] for path in pruners]
    assert found == [{"_target_": "obs", "_version_": ObsPruner.version}] * 2


def test_another_version_is_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = {"_target_": "local_prune.methods.obs.ObsPruner", "damping": 0.1}
    before = recorded(pruner)
    monkeypatch.setattr(ObsPruner, "version", ObsPruner.version + 1)
    assert recorded(pruner) != before


def test_classes_of_others_keep_their_path_and_lists_are_looked_into() -> None:
    assert recorded(
        [{"_target_": "theirs.Text"}, {"_target_": "search.inputs.data.PydocTopics", "n": [1, {"a": None}]}, 3]
    ) == [
        {"_target_": "theirs.Text"},
        {"_target_": "PydocTopics", "n": [1, {"a": None}]},
        3,
    ]
    assert recorded({"_target_": "no.such.Thing"}) == {"_target_": "no.such.Thing"}
