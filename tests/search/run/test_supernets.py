"""A run's supernets are known as its own for as long as its directory is there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from search.paths import CACHE_VARIABLE
from search.run.directory import RunDirectory
from supernet.admin.folders import inspect
from supernet.admin.removal import collect
from supernet.space import Level, Space, Unit
from supernet.store import Supernet

Call = Callable[..., CompletedProcess[str]]

SMOKE = "+experiment=smoke"
RUN = Path("outputs/search/smoke")
LIST = Path("checkpoint/supernets.json")


@pytest.fixture
def supernets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all supernets of this test."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "supernets"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kept(path: Path) -> set[str]:
    """What gc leaves."""
    list(collect(path, dry_run=False))
    return names(path)


def listed_in(file: Path) -> dict[str, str]:
    """Fingerprint -> folder, of a run's list."""
    content: dict[str, str] = json.loads(file.read_text())
    del content["checksum"]
    return content


def test_all_supernets_of_a_run_are_referred_to(finished: Path) -> None:
    folders = [inspect(path) for path in sorted((finished / "cache/supernets").iterdir())]
    listed = listed_in(finished / RUN / LIST)
    assert {folder.manifest["fingerprint"]: str(folder.path) for folder in folders if folder.manifest} == listed
    assert len(listed) == 4  # two rounds, the uniform and the searched model
    for folder in folders:
        assert folder.state == "complete"
        assert finished / RUN / LIST in [
            use.referrer for use in folder.uses
        ]  # copies that other tests run on are others
        assert folder.label("model").startswith("random-llama") and folder.label("method") == "obs"
    assert list(collect(finished / "cache/supernets", dry_run=True)) == [
        ("would free 0 B; supernets that stay: 4", True)
    ]


def test_a_run_keeps_its_supernet_until_its_directory_goes(call: Call, tmp_path: Path, supernets: Path) -> None:
    assert call(SMOKE, "stages=[build]").returncode == 0
    (name,) = names(supernets)
    assert kept(supernets) == {name}
    assert call(SMOKE, "stages=[build]", "hydra.run.dir=second").returncode == 0
    assert len(inspect(supernets / name).uses) == 2
    shutil.rmtree(tmp_path / RUN)
    assert kept(supernets) == {name}
    shutil.rmtree(tmp_path / "second")
    assert kept(supernets) == set()


def test_a_run_that_was_moved_aside_keeps_its_own(call: Call, tmp_path: Path, supernets: Path) -> None:
    assert call(SMOKE, "stages=[build]").returncode == 0
    first = names(supernets)
    assert call(SMOKE, "stages=[build]", "prune=magnitude_sp", "fresh=true").returncode == 0
    assert len(kept(supernets)) == 2
    shutil.rmtree(tmp_path / RUN)
    assert kept(supernets) == first
    shutil.rmtree(tmp_path / f"{RUN}.old-1")
    assert kept(supernets) == set()


def test_a_run_that_ends_before_its_build_names_nothing_that_is_not_there(
    call: Call, tmp_path: Path, supernets: Path
) -> None:
    assert call(SMOKE, "stages=[search]").returncode == 1
    assert not (tmp_path / RUN / LIST).exists() and not supernets.exists()


SPACE = Space((Unit("unit", "mlp", 4, (Level(4, 8), Level(2, 4))),))


def test_the_list_grows_and_starts_anew_where_settings_may_change(tmp_path: Path) -> None:
    def opened() -> RunDirectory:
        return RunDirectory(tmp_path / "run", {"seed": 0}, fresh=False)

    one, two, three = (Supernet.open_or_create(tmp_path, SPACE, {"model": name}) for name in "abc")
    directory = opened()
    file = directory.note_supernet(one.fingerprint, one.path)
    directory.note_supernet(two.fingerprint, two.path)
    assert listed_in(file) == {one.fingerprint: str(one.path), two.fingerprint: str(two.path)}
    directory = opened()  # nothing was done that a change of settings would lose
    directory.note_supernet(two.fingerprint, two.path)
    assert listed_in(file).keys() == {two.fingerprint}
    with directory.stage("build"):
        pass
    opened().note_supernet(three.fingerprint, three.path)
    assert listed_in(file).keys() == {two.fingerprint, three.fingerprint}
