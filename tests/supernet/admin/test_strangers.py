"""`python -m supernet gc` among things that are not ours: whatever lies where in a supernet, none of it goes, and it is
said.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supernet.admin.removal import collect
from supernet.store import Supernet
from supernet.system.atomic import _this_machine

TEMPORARY = f".x.{_this_machine()}-999999999-00000000.tmp"  # of a process that is no more


def outside(path: Path) -> Path:
    """A folder of somebody's beside the supernets, with things that look like ours."""
    folder = path.parent.parent / "precious"
    folder.mkdir(exist_ok=True)
    for name in ("thesis.tex", "0.attention.safetensors", "0123456789abcdef.json", TEMPORARY, ".lock"):
        (folder / name).write_text(f"precious {name}")
    return folder


def put(name: str) -> Callable[[Path], Path]:
    """A file of somebody's."""

    def plant(path: Path) -> Path:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
        return path / name

    return plant


def folder(name: str) -> Callable[[Path], Path]:
    """A folder with something in it, by a name that a file of ours could have."""

    def plant(path: Path) -> Path:
        if (path / name).is_file():
            (path / name).unlink()
        (path / name).mkdir(parents=True)
        (path / name / "notes.txt").write_text("mine")
        return path / name

    return plant


def link(name: str, target: str = "") -> Callable[[Path], Path]:
    """A link in the place of something of ours."""

    def plant(path: Path) -> Path:
        file = path / name
        file.parent.mkdir(exist_ok=True)
        if file.exists():
            file.rename(path.parent.parent / "moved")
        file.symlink_to(outside(path) / target)
        return file

    return plant


def pipe(name: str) -> Callable[[Path], Path]:
    def plant(path: Path) -> Path:
        (path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(path / name)
        return path / name

    return plant


UNIT, USE = "units/0.attention.safetensors", "uses/0123456789abcdef.json"
STRANGERS: dict[str, Callable[[Path], Path]] = {
    "a file at the top": put("notes.txt"),
    "a hidden file at the top": put(".notes"),
    "a file among units": put("units/notes.txt"),
    "a hidden file among units": put("units/.notes.safetensors"),
    "a file among uses": put("uses/notes.json"),
    "a temporary file of another program": put("units/.notes.txt.swp"),
    "a temporary file without a process": put("units/.notes.tmp"),
    "a folder at the top": folder("backup"),
    "a folder among units": folder("units/old"),
    "a folder called as a unit": folder("units/mine.safetensors"),
    "a folder called as a use": folder(USE),
    "a folder called as a temporary file": folder(f"units/{TEMPORARY}"),
    "a folder called as the lock": folder(".lock"),
    "units a link": link("units"),
    "uses a link": link("uses"),
    "a unit a link": link(UNIT, "0.attention.safetensors"),
    "a use a link": link(USE, "0123456789abcdef.json"),
    "a temporary file a link": link(f"units/{TEMPORARY}", TEMPORARY),
    "the lock a link": link(".lock", ".lock"),
    "a link that leads nowhere": link("units/mine.safetensors", "nowhere"),
    "a pipe": pipe("units/mine.safetensors"),
}


def seen(folder: Path) -> dict[str, Any]:
    """All names, contents and targets of links below a folder, links not followed."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            found[str(path.relative_to(folder))] = (
                os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else path.is_dir()
            )
    return found


@pytest.mark.sampled
@pytest.mark.parametrize("state", ["unused", "used", "manifest gone", "manifest damaged"])
@pytest.mark.parametrize("plant", STRANGERS.values(), ids=STRANGERS)
def test_a_supernet_with_something_of_somebody_else_is_left_as_it_is(
    each_kind: Any, tmp_path: Path, plant: Callable[[Path], Path], state: str
) -> None:
    supernet = each_kind.build()
    (supernet.path / ".lock").touch()
    (supernet.path / "units" / TEMPORARY).touch()
    if state == "used":
        (tmp_path / "run.json").write_text(supernet.fingerprint)
        supernet.note_use(tmp_path / "run.json")
    if state == "manifest gone":
        (supernet.path / "manifest.json").unlink()
    if state == "manifest damaged":
        (supernet.path / "manifest.json").write_text("{")
    (supernet.path / "units" / TEMPORARY).unlink()
    planted = plant(supernet.path)
    other = Supernet.open_or_create(each_kind.root, supernet.space, {"model": "unused"})
    other.write("3", list(each_kind.units.values())[-1], {})
    before = {name: what for name, what in seen(tmp_path).items() if other.path.name not in name}
    lines = list(collect(each_kind.root, dry_run=False))
    after = seen(tmp_path)
    assert {name: what for name, what in after.items() if name in before} == before
    assert not other.path.exists()  # the others are none the worse for it
    assert after.keys() == before.keys()
    assert any(line.startswith(f"removed {other.path.name}: no run refers to it") and well for line, well in lines)
    if state in ("unused", "used"):
        within = planted.relative_to(supernet.path)
        assert (f"kept {supernet.path.name}: {within} in it is not ours", True) in lines


@pytest.mark.parametrize(
    "content",
    [
        ["deadbeefdeadbeef/units/thesis.tex"],
        ["deadbeefdeadbeef/units/model.safetensors", "deadbeefdeadbeef/uses/app.json"],
        ["deadbeefdeadbeef/units/model.safetensors/weights.safetensors"],
        ["deadbeefdeadbeef/manifest.json", "deadbeefdeadbeef/units/a.safetensors", "deadbeefdeadbeef/units/b.bin"],
        [".deadbeefdeadbeef.removed/units/thesis.tex"],
        [".my.removed/"],
        [".deadbeefdeadbeef.removed/units/a.safetensors/x"],
        ["app/manifest.json", "app/units/a.safetensors"],
    ],
    ids=" ".join,
)
def test_folders_that_only_look_like_ours_stay(each_kind: Any, content: list[str]) -> None:
    used = each_kind.build("3")
    (each_kind.root.parent / "run.json").write_text(used.fingerprint)
    used.note_use(each_kind.root.parent / "run.json")
    (used.path / ".lock").touch()
    for name in content:
        path = each_kind.root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text('{"name": "an app"}')
    before = seen(each_kind.root)
    assert list(collect(each_kind.root, dry_run=False)) == [("freed 0 B; supernets that stay: 1", True)]
    assert seen(each_kind.root) == before


def test_what_somebody_puts_there_meanwhile_stays(each_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = each_kind.build()
    works = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == supernet.path:
            (path / "notes.txt").write_text("mine")
        return works(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert list(collect(each_kind.root, dry_run=False)) == [("freed 0 B; supernets that stay: 1", True)]
    assert (supernet.path / "notes.txt").read_text() == "mine" and each_kind.open().complete


def test_a_damaged_record_of_a_use_keeps_the_supernet(each_kind: Any, tmp_path: Path) -> None:
    """A run may refer to it: one digit of its path was changed, say."""
    supernet = each_kind.build()
    (tmp_path / "run7.json").write_text(supernet.fingerprint)
    supernet.note_use(tmp_path / "run7.json")
    (record,) = (supernet.path / "uses").iterdir()
    record.write_text(record.read_text().replace("run7", "run8"))
    (line, well), _ = collect(each_kind.root, dry_run=False)
    assert well and line.startswith(
        f"kept {supernet.path.name}: a run may refer to it, but its record uses/{record.name} is dam"
    )
    record.unlink()
    assert list(collect(each_kind.root, dry_run=False))[0][0].startswith(f"removed {supernet.path.name}: ")
