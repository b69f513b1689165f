"""What runs use stays, and what nobody uses goes: nothing else, and nothing by halves."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import filelock
import pytest

from supernet.admin import removal
from supernet.admin.folders import inspect
from supernet.admin.removal import collect
from supernet.errors import InputError
from supernet.manifest import FORMAT, fingerprint_of
from supernet.store import Supernet
from supernet.system.records import write_record
from supernet.uses import uses_of


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A run's file that lists a supernet, which knows of it."""

    def note(supernet: Supernet, name: str = "run") -> Path:
        file = tmp_path / name / "supernets.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({supernet.fingerprint: str(supernet.path)}))
        supernet.note_use(file)
        return file

    return note


def told(lines: Iterator[tuple[str, bool]]) -> list[str]:
    """What is said where all is well."""
    said = list(lines)
    assert all(well for _, well in said), said
    return [line for line, _ in said]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Uses


def test_a_use_counts_while_its_file_lists_the_supernet(each_kind: Any, run: Callable[..., Path]) -> None:
    supernet = each_kind.build()
    first, second = run(supernet, "first"), run(supernet, "second")
    assert {use.referrer for use in inspect(supernet.path).uses} == {first, second}
    second.write_text(json.dumps({"0" * 32: ""}))
    assert [use.referrer for use in inspect(supernet.path).uses] == [first]
    shutil.rmtree(first.parent)
    assert inspect(supernet.path).uses == []
    first.parent.write_text("a file now")
    assert inspect(supernet.path).uses == []
    assert len(uses_of(supernet.path)) == 2  # what was noted says when it was used


def test_a_file_that_may_not_be_read_counts(
    each_kind: Any, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = each_kind.build()
    file = run(supernet)
    read_bytes = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path == file:
            raise PermissionError
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert len(inspect(supernet.path).uses) == 1


def test_the_same_run_is_noted_once_with_its_last_use(
    each_kind: Any, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = each_kind.build()
    file = run(supernet)
    (record,) = (supernet.path / "uses").iterdir()
    content = json.loads(record.read_text())
    assert content["referrer"] == str(file) and content["fingerprint"] == supernet.fingerprint
    assert datetime.now(UTC) - datetime.fromisoformat(content["last_used"]) < timedelta(minutes=1)
    del content["checksum"]
    write_record(record, content | {"last_used": "2020-02-03T04:05:06+00:00"})
    assert inspect(supernet.path).last_used == datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC)
    monkeypatch.chdir(tmp_path)
    supernet.note_use(Path("run/supernets.json"))
    assert len(uses_of(supernet.path)) == 1
    assert datetime.now(UTC) - inspect(supernet.path).last_used < timedelta(minutes=1)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "3", '{"referrer": 1, "fingerprint": 2, "last_used": 3}', b"\xff"]
)
def test_a_damaged_record_is_none(each_kind: Any, run: Callable[..., Path], content: str | bytes) -> None:
    supernet = each_kind.build()
    run(supernet)
    record = next((supernet.path / "uses").iterdir())
    record.write_bytes(content.encode() if isinstance(content, str) else content)
    assert uses_of(supernet.path) == []


def test_labels_are_kept_and_are_no_part_of_the_identity(each_kind: Any) -> None:
    path = each_kind.build("3", model="tiny", method="Mixed").path
    other = each_kind.open(model="another")
    assert other.path == path and other.has("3")
    assert other.manifest["labels"] == {"model": "tiny", "method": "Mixed"}
    each_kind.build()
    assert inspect(path).label("model") == "tiny"


# Removal


def test_only_what_no_run_refers_to_goes(each_kind: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    used, unused = each_kind.build("3"), Supernet.open_or_create(each_kind.root, each_kind.open().space, {"model": "b"})
    unused.write("3", list(each_kind.units.values())[-1], {})
    file = run(used)
    before = files_below(each_kind.root)
    would = told(collect(each_kind.root, dry_run=True))
    assert would[0].startswith(f"would remove {unused.path.name}: no run refers to it (")
    assert would[1].startswith("would free ") and would[1].endswith("; supernets that stay: 1")
    assert files_below(each_kind.root) == before
    did = told(collect(each_kind.root, dry_run=False))
    assert did == [line.replace("would remove", "removed").replace("would free", "freed") for line in would]
    assert [path.name for path in each_kind.root.iterdir()] == [used.path.name]
    assert files_below(used.path).keys() == {f"{name}" for name in inside(before, used.path.name)} | {".lock"}
    shutil.rmtree(file.parent)
    assert told(collect(used.path, dry_run=False))[0].startswith("removed ")
    assert not list(each_kind.root.iterdir())
    with pytest.raises(InputError, match="holds no supernet"):
        told(collect(each_kind.root, dry_run=False))


def inside(files: dict[str, bytes], folder: str) -> list[str]:
    return [name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")]


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_being_built_stays(each_kind: Any, dry_run: bool) -> None:
    supernet = each_kind.build("3")
    with supernet.building():
        assert inspect(supernet.path).state == "being built"
        before = files_below(each_kind.root)
        assert told(collect(each_kind.root, dry_run)) == [
            f"kept {supernet.path.name}: it is being built",
            f"{'would free' if dry_run else 'freed'} 0 B; supernets that stay: 1",
        ]
        assert files_below(each_kind.root) == before
    assert inspect(supernet.path).state == "unfinished"


def test_one_that_is_begun_and_referred_to_stays(each_kind: Any, run: Callable[..., Path]) -> None:
    """Between the note of its first use and its first unit there is no manifest."""
    supernet = each_kind.open()
    file = run(supernet)
    assert inspect(supernet.path).state == "unfinished" and not (supernet.path / "manifest.json").exists()
    assert told(collect(each_kind.root, dry_run=False)) == ["freed 0 B; supernets that stay: 1"]
    file.unlink()
    assert told(collect(each_kind.root, dry_run=False))[0].startswith(
        f"removed {supernet.path.name}: no run refers to it"
    )


def damaged_manifest(supernet: Supernet) -> None:
    (supernet.path / "manifest.json").write_text("{")


def missing_unit(supernet: Supernet) -> None:
    (supernet.path / "units" / "3.safetensors").unlink()


@pytest.mark.parametrize("damage", [damaged_manifest, missing_unit])
def test_a_damaged_one_goes_where_no_run_refers_to_it(
    each_kind: Any, run: Callable[..., Path], damage: Callable[[Supernet], None]
) -> None:
    supernet = each_kind.build()
    file = run(supernet)
    damage(supernet)
    assert inspect(supernet.path).state == "damaged"
    assert told(collect(each_kind.root, dry_run=False)) == ["freed 0 B; supernets that stay: 1"]
    file.unlink()
    assert told(collect(each_kind.root, dry_run=False))[0].startswith(
        f"removed {supernet.path.name}: no run refers to it"
    )


def of_format(supernet: Supernet, number: int) -> Path:
    """The folder as another version would have written it."""
    content = supernet.manifest | {"format": number}
    content |= {"fingerprint": fingerprint_of(content), "units": {"3": {"file": "units/3.safetensors"}}}
    path = supernet.path.with_name(content["fingerprint"][:16])
    supernet.path.rename(path)
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def test_an_older_format_goes_and_a_newer_one_stays(each_kind: Any, run: Callable[..., Path]) -> None:
    newer = of_format(each_kind.build(), FORMAT + 1)
    supernet = each_kind.build()
    file = run(supernet)
    older = of_format(supernet, FORMAT - 1)
    assert (inspect(older).state, inspect(newer).state) == (f"format {FORMAT - 1}", f"format {FORMAT + 1}")
    assert told(collect(each_kind.root, dry_run=False)) == [
        "freed 0 B; supernets that stay: 2"
    ]  # an older version's run may use it
    file.unlink()
    did = told(collect(each_kind.root, dry_run=False))
    assert len(did) == 2
    assert did[0].startswith(f"removed {older.name}: it is of format {FORMAT - 1}, which this version cannot read (")
    assert [path.name for path in each_kind.root.iterdir()] == [newer.name]


def test_one_that_a_run_comes_to_use_meanwhile_stays(
    each_kind: Any, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = each_kind.build()
    size_of = removal.size_of

    def meanwhile(folder: Path) -> int:
        run(supernet)
        return size_of(folder)

    monkeypatch.setattr(removal, "size_of", meanwhile)
    assert told(collect(each_kind.root, dry_run=False)) == ["freed 0 B; supernets that stay: 1"]
    assert inspect(supernet.path).state == "complete"


def test_one_with_files_of_somebody_else_stays(each_kind: Any) -> None:
    supernet = each_kind.build()
    (supernet.path / "notes.txt").write_text("mine")
    assert told(collect(each_kind.root, dry_run=False)) == [
        f"kept {supernet.path.name}: notes.txt in it is not ours",
        "freed 0 B; supernets that stay: 1",
    ]
    assert (supernet.path / "notes.txt").read_text() == "mine"


FOREIGN: dict[str, dict[str, str]] = {
    "a folder of another program": {"my notes/manifest.json": '{"name": "an app", "units": {}}'},
    "one with a name like ours": {"0123456789abcdef/manifest.json": "{}", "0123456789abcdef/thesis.tex": ""},
    "an empty one with a name like ours": {"0123456789abcdef/": ""},
    "one that looks removed": {".thesis.removed/thesis.tex": ""},
    "a file": {"0123456789abcdef": ""},
    "units under a name that is not ours": {"mine/units/a.safetensors": "", "mine/manifest.json": "{"},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_ours_is_left_alone(each_kind: Any, content: dict[str, str]) -> None:
    each_kind.build("3")
    for name, text in content.items():
        file = each_kind.root / name
        (file if name.endswith("/") else file.parent).mkdir(exist_ok=True, parents=True)
        if not name.endswith("/"):
            file.write_text(text)
    assert len(told(collect(each_kind.root, dry_run=False))) == 2
    assert files_below(each_kind.root) == {
        name: text.encode() for name, text in content.items() if not name.endswith("/")
    }
    assert len(list(each_kind.root.iterdir())) == 1


def test_a_link_to_a_supernet_is_left_alone(each_kind: Any, tmp_path: Path) -> None:
    supernet = each_kind.build("3")
    supernet.path.rename(tmp_path / supernet.path.name)
    supernet.path.symlink_to(tmp_path / supernet.path.name)
    with pytest.raises(InputError, match="holds no supernet"):
        told(collect(each_kind.root, dry_run=False))
    assert each_kind.open().has("3")


@pytest.mark.parametrize("alone", [True, False], ids=["nothing else", "beside another"])
def test_an_interrupted_removal_leaves_nothing_whole_and_is_finished(
    each_kind: Any, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    unused = Supernet.open_or_create(each_kind.root, each_kind.open().space, {"model": "b"})
    unused.write("3", list(each_kind.units.values())[-1], {})
    if not alone:
        run(each_kind.build("3"))

    def interrupted(folder: Path) -> None:
        (folder / ".lock").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            told(collect(each_kind.root, dry_run=False))
    assert not Supernet.open_or_create(each_kind.root, unused.space, {"model": "b"}).has("3")
    rest = each_kind.root / f".{unused.path.name}.removed"
    assert (rest / "manifest.json").exists()
    did = told(collect(each_kind.root, dry_run=False))
    assert did[0].startswith(f"removed {rest.name}: an interrupted gc left it (")
    assert did[1].endswith(f"; supernets that stay: {0 if alone else 1}")
    assert not rest.exists()


def test_what_cannot_be_removed_is_told(each_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = each_kind.build("3")

    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", fails)
    (line, well), _ = collect(each_kind.root, dry_run=False)
    assert (line, well) == (f"kept {supernet.path.name}: cannot remove {supernet.path}: Permission denied", False)


def test_a_supernet_that_went_is_built_again(each_kind: Any) -> None:
    """By a run that had opened it before: it sees that, and does not name what is no longer there."""
    each_kind.build()
    late = each_kind.open()
    assert late.complete
    told(collect(each_kind.root, dry_run=False))
    with late.building():
        late.refresh()
        assert not late.complete and late.manifest["units"] == {}
        late.write("3", list(each_kind.units.values())[-1], {})
    each_kind.read(each_kind.open(), 5, 1)
    with filelock.FileLock(late.path / ".lock", timeout=0):
        pass
