"""Supernets that somebody made up, with checksums that are right: each command says so in a line and goes on with the
others.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from supernet.__main__ import main
from supernet.admin.folders import plain
from supernet.errors import InputError
from supernet.manifest import fingerprint_of, unit_path
from supernet.store import Supernet
from supernet.system.records import read_record, write_record
from supernet.unit_file import LENGTH

Change = Callable[[dict[str, Any]], object]


def space(**changes: Any) -> Change:
    """Other values of the first unit in the space."""
    return lambda manifest: manifest["space"][0].update(changes)


def named(name: str) -> Change:
    """The first unit under another name, with an entry."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["units"][name] = manifest["units"].pop(manifest["space"][0]["name"])
        manifest["space"][0]["name"] = name

    return rename


MANIFESTS: dict[str, Change] = {
    "format infinite": lambda manifest: manifest.update(format=float("inf")),
    "format a text": lambda manifest: manifest.update(format="3"),
    "format a list": lambda manifest: manifest.update(format=[]),
    "levels that do not fall": space(levels=[[4, 40], [2, 40]]),
    "no levels": space(levels=[]),
    "levels too short": space(levels=[[4]]),
    "levels of texts": space(levels=[["4", "40"]]),
    "levels negative": space(levels=[[4, 40], [-1, -1]]),
    "levels that keep more than all": space(levels=[[4, 40], [5, 20]]),
    "total 0": space(total=0, levels=[[0, 40], [0, 20]]),
    "total a text": space(total="4"),
    "no kind": lambda manifest: manifest["space"][0].pop("kind"),
    "space a number": lambda manifest: manifest.update(space=3),
    "two units of a name": lambda manifest: manifest["space"].append(manifest["space"][0]),
    "a path": named("/etc/passwd"),
    "a path upwards": named("../../../../etc/passwd"),
    "two dots": named(".."),
    "NUL": named("a\0b"),
    "a lone surrogate": named("a\ud800"),
    "a line break": named("a\nb"),
    "a long name": named("a" * 300),
    "no name": named(""),
    "labels a list": lambda manifest: manifest.update(labels=[]),
    "entries a list": lambda manifest: manifest.update(units=[]),
}


def forge(supernet: Supernet, change: Change) -> Path:
    """Change the manifest, and all hashes with it."""
    file = supernet.path / "manifest.json"
    content = read_record(file)
    assert content is not None
    change(content)
    write_record(file, content | {"fingerprint": fingerprint_of(content)})
    return file


@pytest.fixture
def good(each_kind: Any) -> Supernet:
    """A supernet of somebody's beside the forged one, which a run uses."""
    supernet = Supernet.open_or_create(each_kind.root, each_kind.open().space, {"model": "good"})
    for unit, candidates in each_kind.units.items():
        supernet.write(unit.name, candidates, {})
    run = each_kind.root.parent / "run.json"
    run.write_text(supernet.fingerprint)
    supernet.note_use(run)
    return supernet


def all_commands(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str, Any]]:
    told = {}
    for command in (["ls"], ["verify"], ["size"], ["gc", "--dry-run"]):
        status: Any = 0
        try:
            main([*command, str(root)])
        except SystemExit as end:
            status = end.code
        told[command[0]] = (*capsys.readouterr(), status)
    return told


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_forged_manifest_stops_nothing(
    each_kind: Any, good: Supernet, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = forge(each_kind.build(), change).parent
    for command, (output, errors, status) in all_commands(each_kind.root, capsys).items():
        assert errors == "" and "\x1b" not in output and good.path.name in output or command == "gc", command
        assert (status == 1) == (command != "gc"), command
        if command in ("verify", "size"):
            (line,) = [line for line in output.splitlines() if line.startswith(forged.name)]
            assert f"the supernet file {forged}/manifest.json is damaged: " in line
            assert line.endswith(f"; delete the folder {forged} and build again")


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no metadata": lambda header: {name: value for name, value in header.items() if name != "__metadata__"},
    "no checksums": lambda header: header | {"__metadata__": {}},
    "checksums that are none": lambda header: header | {"__metadata__": {"checksums": "[]"}},
    "a list": lambda header: [],
    "null": lambda header: None,
    "deep": lambda header: "[" * 5000,
    "an unknown dtype": lambda header: changed(header, dtype="F4"),
    "a shape too large": lambda header: changed(header, shape=[1 << 40]),
    "a shape of texts": lambda header: changed(header, shape=["1"]),
    "a negative shape": lambda header: changed(header, shape=[-1, -1]),
    "offsets behind the end": lambda header: changed(header, data_offsets=[1 << 40, 1 << 41]),
    "offsets backwards": lambda header: changed(header, data_offsets=[9, 3]),
    "one offset": lambda header: changed(header, data_offsets=[1]),
    "a tensor that is no level's": lambda header: header | {"abc.def": header["1.contents"]},
}


def changed(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value if name == "__metadata__" else value | changes for name, value in header.items()}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_forged_header_is_one_line(
    each_kind: Any, good: Supernet, change: Callable[[dict[str, Any]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    supernet = each_kind.build()
    file = unit_path(supernet.path, "0.attention")
    data = file.read_bytes()
    length = int.from_bytes(data[:LENGTH], "little")
    made = change(json.loads(data[LENGTH : LENGTH + length]))
    header = (made if isinstance(made, str) else json.dumps(made)).encode()
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(LENGTH, "little") + header
    file.write_bytes(whole + data[LENGTH + length :])
    entry = {
        "bytes": len(data) - length + len(header),
        "header": len(whole),
        "checksum": xxhash.xxh3_128_hexdigest(whole),
    }
    forge(supernet, lambda manifest: manifest["units"]["0.attention"].update(entry))
    for command, (output, errors, status) in all_commands(each_kind.root, capsys).items():
        assert errors == "" and (good.path.name in output or command == "gc")
        assert status in (0, 1)
    again = each_kind.open()
    try:
        each_kind.read(again, 0, 1)
    except InputError as error:
        assert f"delete the folder {supernet.path} and build again" in str(error) and "\n" not in str(error)


def test_records_of_uses_that_lead_to_pipes_and_devices_stop_nothing(
    each_kind: Any, good: Supernet, capsys: pytest.CaptureFixture[str]
) -> None:
    supernet = each_kind.build()
    os.mkfifo(each_kind.root.parent / "pipe")
    uses = [
        {"referrer": "/dev/zero"},
        {"referrer": str(each_kind.root.parent / "pipe")},
        {"referrer": "\0"},
        {"referrer": "\ud800"},
        {"referrer": str(each_kind.root)},
        {"last_used": "0001-01-01T00:00:00+23:59"},
        {"last_used": "9999-12-31T23:59:59-23:59"},
        {"last_used": 3},
        {"fingerprint": ""},
    ]
    usual = {"referrer": "/nowhere", "fingerprint": supernet.fingerprint, "last_used": "2026-01-01T00:00:00+00:00"}
    for number, use in enumerate(uses):
        write_record(supernet.path / "uses" / f"{number:016x}.json", usual | use)
    os.mkfifo(good.path / "uses" / ("f" * 16 + ".json"))
    (supernet.path / "uses" / ("e" * 16 + ".json")).write_text("[" * 100_000)
    told = all_commands(each_kind.root, capsys)
    assert all(errors == "" and supernet.path.name in output for output, errors, _ in told.values())


def test_labels_are_printed_as_they_are_read(each_kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    each_kind.build(model="a\n\x1b[2Jb\ud800\u202e", method="x" * 200)
    main(["ls", str(each_kind.root)])
    output, errors = capsys.readouterr()
    assert errors == "" and output.count("\n") == 2
    assert r"a\n\x1b[2Jb\ud800\u202e" in output and "x" * 57 + "..." in output and "x" * 58 not in output
    assert plain("é ü 漢 'quote'") == "é ü 漢 'quote'"


def test_a_manifest_that_is_too_long_is_not_parsed(each_kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    supernet = each_kind.build()
    (supernet.path / "manifest.json").write_bytes(b"[" + b"[]," * 10_000_000 + b"[]]")
    told = all_commands(each_kind.root, capsys)
    assert "no such file has more than 16,777,216" in told["verify"][0]


def test_the_folder_to_delete_is_never_the_one_above(each_kind: Any) -> None:
    """Of a supernet that was copied to a folder called units."""
    supernet = each_kind.build()
    copied = supernet.path.rename(each_kind.root / "units")
    forged = forge(Supernet(copied, supernet.manifest), lambda manifest: manifest.update(labels=[]))
    with pytest.raises(InputError, match=rf"delete the folder {copied} and build again$"):
        from supernet.manifest import read_manifest

        read_manifest(forged.parent)
