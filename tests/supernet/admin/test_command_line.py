"""`python -m supernet`: lines that a user understands, and one where something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supernet.__main__ import main
from supernet.admin.listing import readable, spread, table
from supernet.manifest import unit_path
from supernet.space import Space
from supernet.store import Supernet
from supernet.system.records import write_record

Told = tuple[str, str, int]
Tell = Callable[..., Told]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Runs a command line: what it prints, what it prints as errors, and its status."""

    def run(*arguments: object) -> Told:
        capsys.readouterr()
        status: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return (*capsys.readouterr(), status)

    return run


def used(supernet: Supernet, time: str) -> None:
    """By a run, at a time."""
    run = supernet.path.parent.parent / f"{supernet.path.name}.json"
    run.write_text(supernet.fingerprint)
    supernet.note_use(run)
    (record,) = (supernet.path / "uses").iterdir()
    content = json.loads(record.read_text())
    del content["checksum"]
    write_record(record, content | {"last_used": time})


@pytest.fixture
def several(each_kind: Any) -> list[Supernet]:
    """A complete supernet, an unfinished one that was used before, and one whose manifest is damaged."""
    complete = each_kind.build(model="tiny", method="Mixed")
    used(complete, "2030-05-06T07:08:09+00:00")
    space = Space(tuple(each_kind.units)[2:4])
    unfinished = Supernet.open_or_create(each_kind.root, space, {"model": "b"}, {"model": "a longer name"})
    unfinished.write("1.chosen", each_kind.units[space.units[0]], {})
    used(unfinished, "2031-05-06T07:08:09+00:00")
    damaged = Supernet.open_or_create(each_kind.root, space, {"model": "c"})
    damaged.write("1.chosen", each_kind.units[space.units[0]], {})
    (damaged.path / "manifest.json").write_text("{")
    return [complete, unfinished, damaged]


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_ls_has_a_line_for_each(several: list[Supernet], tell: Tell) -> None:
    complete, unfinished, damaged = several
    output, errors, status = tell("ls", complete.path.parent)
    assert (errors, status) == ("", 1)  # one is damaged
    header, *lines = output.splitlines()
    assert cells(header) == [
        "supernet",
        "model",
        "method",
        "units",
        "levels",
        "sparsity",
        "size",
        "last used",
        "runs",
        "state",
    ]
    assert [cells(line)[0] for line in lines] == [
        s.path.name for s in (unfinished, complete, damaged)
    ]  # the latest first
    row = dict(zip(cells(header), cells(lines[1]), strict=True))
    assert row.pop("last used").startswith("2030-05-0")
    size = sum(file.stat().st_size for file in complete.path.rglob("*") if file.is_file())
    assert row == {
        "supernet": complete.path.name,
        "model": "tiny",
        "method": "Mixed",
        "units": "6/6",
        "levels": "2-3",
        "sparsity": "45-100 %",
        "size": readable(size),
        "runs": "1",
        "state": "complete",
    }
    assert cells(lines[0])[1:5] == ["a longer name", "-", "1/2", "3"] and cells(lines[0])[-1] == "unfinished"
    assert cells(lines[2])[1:6] == ["-", "-", "0/?", "-", "-"] and cells(lines[2])[-2:] == ["0", "damaged"]


def test_ls_of_one_supernet(several: list[Supernet], tell: Tell) -> None:
    output, _, status = tell("ls", several[0].path)
    assert status == 0 and len(output.splitlines()) == 2


def test_verify_says_what_is_damaged_and_what_to_do(several: list[Supernet], tell: Tell) -> None:
    complete, unfinished, damaged = several
    output, errors, status = tell("verify", complete.path.parent)
    assert (errors, status) == ("", 1)
    lines = {line.partition(":")[0]: line.partition(": ")[2] for line in output.splitlines()}
    assert re.fullmatch(r"ok, 6 of 6 units, [\d.]+ kB", lines[complete.path.name])
    assert re.fullmatch(r"ok, 1 of 2 units, [\d.]+ kB", lines[unfinished.path.name])
    assert lines[damaged.path.name].startswith(
        f"damaged: the supernet file {damaged.path}/manifest.json is damaged: it is no JSON: "
    )
    assert lines[damaged.path.name].endswith(f"; delete the folder {damaged.path} and build again")
    for name in ("0.attention", "2.bits"):
        file = unit_path(complete.path, name)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    output, _, status = tell("verify", complete.path)
    assert status == 1 and output.count("\n") == 1
    assert (
        f"damaged: the supernet file {complete.path}/units/0.attention.safetensors is damaged: its checksum" in output
    )
    assert output.endswith("and build again (and 1 more units are damaged)\n")
    assert tell("verify", unfinished.path)[2] == 0


def test_verify_sees_a_level_that_is_another(each_kind: Any, tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(tuple(unit for unit in each_kind.units if unit.name == "1.chosen"))
    supernet = Supernet.open_or_create(each_kind.root, space, {})
    supernet.write("1.chosen", each_kind.units[space.units[0]], {})
    monkeypatch.setattr("supernet.admin.inspection.count", lambda candidate: 33)
    output, _, status = tell("verify", each_kind.root)
    assert status == 1 and "level 2 keeps 33 and not 7; delete the folder" in output


def test_size_tells_every_byte(several: list[Supernet], tell: Tell) -> None:
    output, errors, status = tell("size", several[0].path)
    assert (errors, status) == ("", 0)
    title, header, *rows = output.splitlines()
    files = {file.stem: file.stat().st_size for file in (several[0].path / "units").iterdir()}
    assert title.startswith(f"{several[0].path.name}: {readable(sum(files.values()))} (attention ")
    assert cells(header) == ["unit", "kind", "level 1", "level 2", "shared", "header", "all"]
    table_rows = {cells(row)[0]: dict(zip(cells(header), cells(row), strict=True)) for row in rows}
    assert {name: row["all"] for name, row in table_rows.items()} == {
        name: readable(size) for name, size in files.items()
    }
    assert table_rows["0.attention"]["level 1"] == "88 B"  # two indices of 4 bytes, 5 x 6 values of 2, a bias of 5 x 4
    assert table_rows["1.chosen"]["shared"] != "-" and table_rows["2.bits"]["shared"] == "-"
    assert table_rows["3"]["level 2"] == "-"
    assert len({len(row) for row in [header, *rows]}) == 1  # numbers end under each other


def test_size_compares_linear_layers_with_dense_files(several: list[Supernet], tell: Tell) -> None:
    output, _, _ = tell("size", several[1].path)
    size = unit_path(several[1].path, "1.chosen").stat().st_size
    dense = 2 * 60 * 2
    assert f", {size / dense:.1%} of what dense files of 2 bytes a weight take for these levels ({dense} B)\n" in output


def test_size_goes_on_behind_a_damaged_one(several: list[Supernet], tell: Tell) -> None:
    file = unit_path(several[0].path, "3")
    file.write_bytes(file.read_bytes()[::-1])
    output, errors, status = tell("size", several[0].path.parent)
    assert (errors, status) == ("", 1)
    parts = {part.partition(":")[0]: part for part in output.strip().split("\n\n")}
    assert parts.keys() == {supernet.path.name for supernet in several}
    assert "3.safetensors is damaged" in parts[several[0].path.name]
    assert "header" in parts[several[1].path.name]
    assert "manifest.json is damaged" in parts[several[2].path.name]


def test_gc_says_first_and_does_then(several: list[Supernet], tell: Tell) -> None:
    root = several[0].path.parent
    output, _, status = tell("gc", "--dry-run", root)
    assert status == 0 and f"would remove {several[2].path.name}: no run refers to it" in output
    assert several[2].path.exists()
    output, _, status = tell("gc", root)
    assert status == 0 and f"removed {several[2].path.name}: no run refers to it" in output
    assert output.splitlines()[-1].startswith("freed ")
    assert {path.name for path in root.iterdir()} == {supernet.path.name for supernet in several[:2]}
    assert tell("verify", root)[2] == 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "COMMAND"),
    "an unknown command": (["list", "{root}"], "invalid choice: 'list'"),
    "no path": (["ls"], "PATH"),
    "too much": (["ls", "{root}", "{root}"], "unrecognized arguments"),
    "an option of another command": (["ls", "--dry-run", "{root}"], "unrecognized arguments: --dry-run"),
    "nothing there": (
        ["ls", "{root}/nothing"],
        "there is no folder {root}/nothing; give a supernet, or the folder of all",
    ),
    "a file": (["gc", "{root}/file"], "there is no folder {root}/file"),
    "no supernet": (
        ["verify", "{root}/empty"],
        "{root}/empty holds no supernet; give a supernet, or the folder of all",
    ),
    "the folder above": (["size", "{root}"], "{root} holds no supernet; did you mean {root}/supernets?"),
}


@pytest.mark.parametrize(("arguments", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_with_one_line(
    tmp_path: Path, each_kind: Any, tell: Tell, arguments: list[str], line: str
) -> None:
    each_kind.build("3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    output, errors, status = tell(*(argument.format(root=tmp_path) for argument in arguments))
    assert (output, status) == ("", 1)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and line.format(root=tmp_path) in errors


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_an_interruption_is_no_traceback(
    number: signal.Signals, word: str, status: int, several: list[Supernet], tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("supernet.admin.listing.listing", lambda *_: signal.raise_signal(number))
    assert tell("ls", several[0].path) == ("", f"{word}; nothing is half done; give the same command again\n", status)
    assert signal.getsignal(signal.SIGTERM) is before


WITHOUT_TORCH = """
import sys
from supernet.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
assert not {"torch", "numpy", "transformers"} & sys.modules.keys()
"""


def test_a_process_of_its_own(several: list[Supernet]) -> None:
    root = several[0].path.parent
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)

    done = run("-m", "supernet", "ls", ".")
    assert (done.returncode, done.stderr) == (1, "")  # one is damaged
    assert done.stdout.count("\n") == 4
    wrong = run("-m", "supernet", "ls", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "") and wrong.stderr.count("\n") == 1
    for command in ("ls", "gc"):
        assert run("-c", WITHOUT_TORCH, command, root).stderr == ""  # they answer at once


def test_numbers_for_people() -> None:
    assert [readable(size) for size in (0, 999, 1000, 1_250_000, 7_600_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "7.6 GB",
    ]
    assert [spread(numbers) for numbers in ([], [3, 3], [5, 2, 9])] == ["-", "3", "2-9"]
    assert table([["a", "size"], ["long", "9"]], [1]) == "a     size\nlong     9"
