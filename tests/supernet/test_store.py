"""Candidates come back bit for bit, or not at all: damage, interruption and full disks are seen, and told in
one line.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights
from supernet.errors import InputError
from supernet.space import Level, Space, Unit
from supernet.store import Supernet, write_atomic

D_OUT, WIDTH = 5, 3
SPACE = Space(
    (
        Unit("model.layers.0.self_attn", "attention", 4, (Level(4, 40), Level(2, 20), Level(0, 0))),
        Unit("model.layers.0.mlp", "mlp", 4, (Level(4, 36), Level(3, 27))),
    )
)
DESCRIPTION = {"model": "a", "settings": {"damping": 0.01}}


def candidates(unit: int, dtype: torch.dtype = torch.bfloat16) -> list[Members]:
    generator = torch.Generator().manual_seed(unit)
    return [
        Members(
            torch.randperm(4, generator=generator)[: level.kept].sort().values,
            torch.randn(D_OUT, level.kept * WIDTH, generator=generator).to(dtype),
        )
        for level in SPACE.units[unit].levels[1:]
    ]


def reopened(root: Path) -> Supernet:
    return Supernet.open_or_create(root, SPACE, DESCRIPTION)


@pytest.fixture
def finished(tmp_path: Path) -> Supernet:
    """As left on disk by an earlier process."""
    supernet = reopened(tmp_path)
    for index, unit in enumerate(SPACE.units):
        supernet.write(unit.name, candidates(index), {"errors": [0.5] * (len(SPACE.units[index].levels) - 1)})
    return reopened(tmp_path)


def assert_holds(supernet: Supernet, unit: int, dtype: torch.dtype = torch.bfloat16) -> None:
    for level, expected in enumerate(candidates(unit, dtype), start=1):
        found = supernet.candidate(unit, level)
        assert isinstance(found, Members) and found.weight is not None and expected.weight is not None
        assert found.bias is None
        assert found.kept.dtype == torch.int64
        assert found.weight.dtype == dtype
        assert torch.equal(found.kept, expected.kept)
        assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    supernet = reopened(tmp_path)
    for index, unit in enumerate(SPACE.units):
        assert not supernet.complete
        supernet.write(unit.name, candidates(index, dtype), {})
    assert supernet.complete
    for index in range(len(SPACE.units)):
        assert_holds(supernet, index, dtype)
        assert_holds(reopened(tmp_path), index, dtype)


D_IN = 12
CODES = torch.arange(D_OUT * D_IN).view(D_OUT, D_IN)
KINDS: dict[str, tuple[Unit, list[Candidate]]] = {
    "compensated members": (
        Unit("a", "mlp", 4, (Level(4, 40), Level(2, 20))),
        [Members(torch.tensor([1, 3]), torch.randn(D_OUT, 2), torch.randn(D_OUT))],
    ),
    "chosen members": (
        Unit("a", "heads", 4, (Level(4, 40), Level(2, 20), Level(0, 0))),
        [Members(torch.tensor([1, 3]), None), Members(torch.arange(0), None)],
    ),
    "chosen weights": (
        Unit("a", "weights", 60, (Level(60, 60), Level(33, 33), Level(7, 7))),
        [Weights(CODES < 33, None), Weights(CODES < 7, None)],
    ),
    "refitted weights": (
        Unit("a", "weights", 60, (Level(60, 60), Level(33, 33))),
        [Weights(CODES < 33, torch.randn(D_OUT, D_IN) * (CODES < 33))],
    ),
    "bits": (
        Unit("a", "bits", 32, (Level(32, 32), Level(4, 4), Level(2, 2))),
        [
            Quantised((CODES % 2**bits).byte(), torch.rand(D_OUT, 3), torch.ones(D_OUT, 3, dtype=torch.uint8), bits)
            for bits in (4, 2)
        ],
    ),
    "presence": (Unit("a", "block", 1, (Level(1, 1), Level(0, 0))), [Dropped()]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_candidate_comes_back(tmp_path: Path, kind: str) -> None:
    unit, expected = KINDS[kind]
    space = Space((unit,))
    Supernet.open_or_create(tmp_path, space, {}).write("a", expected, {})
    supernet = Supernet.open_or_create(tmp_path, space, {})
    for level in reversed(range(1, len(unit.levels))):  # in any order
        found = supernet.candidate(0, level)
        assert type(found) is type(expected[level - 1])
        for name, value in vars(expected[level - 1]).items():
            got = getattr(found, name)
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_byte_of_any_kind_is_seen(tmp_path: Path, kind: str) -> None:
    unit, stored = KINDS[kind]
    supernet = Supernet.open_or_create(tmp_path, Space((unit,)), {})
    supernet.write("a", stored, {})
    file = supernet.path / "units" / "a.safetensors"
    data = file.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 20)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(InputError, match="is damaged: its checksum does not match"):
            damaged = Supernet.open_or_create(tmp_path, Space((unit,)), {})
            for level in range(1, len(unit.levels)):
                damaged.candidate(0, level)
    file.write_bytes(data)
    Supernet.open_or_create(tmp_path, Space((unit,)), {}).candidate(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_come_back_on_the_device_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    unit, stored = KINDS[kind]
    supernet = Supernet.open_or_create(tmp_path, Space((unit,)), {})
    supernet.write("a", stored, {})
    found = supernet.candidate(0, 1, "meta")
    assert all(value.device.type == "meta" for value in vars(found).values() if isinstance(value, torch.Tensor))


def test_the_same_settings_find_the_same_supernet(finished: Supernet) -> None:
    again = reopened(finished.path.parent)
    assert again.complete
    assert (again.path, again.fingerprint, again.space) == (finished.path, finished.fingerprint, SPACE)
    assert again.manifest["units"][SPACE.units[0].name]["errors"] == [0.5] * (len(SPACE.units[0].levels) - 1)


@pytest.mark.parametrize(
    ("space", "description"),
    [
        pytest.param(SPACE, DESCRIPTION | {"model": "b"}, id="description"),
        pytest.param(SPACE, DESCRIPTION | {"settings": {"damping": 0.1}}, id="nested setting"),
        pytest.param(SPACE, DESCRIPTION | {"more": None}, id="one setting more"),
        pytest.param(Space(SPACE.units[:1]), DESCRIPTION, id="units"),
        pytest.param(
            Space((SPACE.units[0], Unit("model.layers.0.mlp", "mlp", 4, (Level(4, 36), Level(2, 18))))),
            DESCRIPTION,
            id="levels",
        ),
    ],
)
def test_other_settings_have_another_folder(finished: Supernet, space: Space, description: dict[str, Any]) -> None:
    other = Supernet.open_or_create(finished.path.parent, space, description)
    assert other.path != finished.path
    assert not other.complete


def test_the_order_of_settings_does_not_matter(finished: Supernet) -> None:
    other = dict(reversed(DESCRIPTION.items()))
    assert Supernet.open_or_create(finished.path.parent, SPACE, other).path == finished.path


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, empty, remove])
def test_a_damaged_unit_is_seen_and_the_advice_heals(finished: Supernet, damage: Callable[[Path], None]) -> None:
    root, file = finished.path.parent, finished.path / "units" / "model.layers.0.mlp.safetensors"
    damage(file)
    assert_holds(finished, 0)
    with pytest.raises(InputError, match=re.escape(str(file)) + " is damaged") as caught:
        finished.candidate(1, 1)
    assert "\n" not in str(caught.value)
    advice = re.search(r"delete the folder (\S+) and build again", str(caught.value))
    assert advice
    shutil.rmtree(advice[1])
    healed = reopened(root)
    assert not healed.has(SPACE.units[1].name)


def test_what_was_released_is_read_and_checked_again(finished: Supernet) -> None:
    before = finished.candidate(0, 1)
    finished.release()
    assert_holds(finished, 0)
    finished.release()
    flip_a_bit(finished.path / "units" / f"{SPACE.units[0].name}.safetensors")
    with pytest.raises(InputError, match="checksum"):
        finished.candidate(0, 1)
    # what was read before is still there
    assert isinstance(before, Members) and torch.equal(before.kept, candidates(0)[0].kept)


def manifest_of(supernet: Supernet) -> Path:
    return supernet.path / "manifest.json"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda manifest: None, id="not JSON"),
        pytest.param(lambda manifest: [], id="a list"),
        pytest.param(lambda manifest: {}, id="empty"),
        pytest.param(lambda manifest: manifest | {"fingerprint": "0"}, id="fingerprint"),
        pytest.param(lambda manifest: manifest | {"description": {"model": "b"}}, id="description"),
        pytest.param(lambda manifest: manifest | {"space": manifest["space"][:1]}, id="space"),
        pytest.param(lambda manifest: manifest | {"format": 0}, id="format"),
        pytest.param(lambda manifest: {key: manifest[key] for key in manifest if key != "units"}, id="no units"),
        pytest.param(lambda manifest: manifest | {"units": []}, id="units a list"),
    ],
)
def test_a_damaged_manifest_is_seen(finished: Supernet, damage: Callable[[dict[str, Any]], Any]) -> None:
    file = manifest_of(finished)
    content = damage(json.loads(file.read_text()))
    file.write_text(file.read_text()[:-9] if content is None else json.dumps(content))
    with pytest.raises(InputError, match=re.escape(f"{file} is damaged")) as caught:
        reopened(finished.path.parent)
    assert f"delete the folder {finished.path} and build again" in str(caught.value)


def test_a_checksum_that_was_changed_is_seen(finished: Supernet) -> None:
    file = manifest_of(finished)
    content = json.loads(file.read_text())
    content["units"][SPACE.units[0].name]["checksum"] = "0" * 32
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="checksum"):
        reopened(finished.path.parent).candidate(0, 1)


def test_a_unit_that_is_not_built_is_asked_for_in_vain(tmp_path: Path) -> None:
    supernet = reopened(tmp_path)
    supernet.write(SPACE.units[0].name, candidates(0), {})
    assert supernet.has(SPACE.units[0].name)
    with pytest.raises(InputError, match=r"no candidates of model\.layers\.0\.mlp.*add build to stages"):
        supernet.candidate(1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda good: good[:1], id="a level too few"),
        pytest.param(lambda good: [*good, good[-1]], id="a level too many"),
        pytest.param(lambda good: good[::-1], id="levels in another order"),
        pytest.param(lambda good: [good[0], good[0]], id="another number of members"),
    ],
)
def test_wrong_counts_are_refused(tmp_path: Path, wrong: Callable[[list[Members]], list[Members]]) -> None:
    supernet = reopened(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn: candidates keep"):
        supernet.write(SPACE.units[0].name, wrong(candidates(0)), {})
    assert not supernet.has(SPACE.units[0].name)
    assert not any(tmp_path.rglob("*.safetensors"))


def files_below(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("function", "failing_call"),
    [
        ("replace", 1),
        ("replace", 2),
        ("fsync", 1),
        ("fsync", 3),
    ],  # of a unit and of the manifest; between them the folder's
)
def test_a_full_disk_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failing_call: int
) -> None:
    supernet = reopened(tmp_path)
    supernet.write(SPACE.units[0].name, candidates(0), {})
    before = files_below(tmp_path)
    works, calls = getattr(os, function), []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(InputError, match="cannot write .*No space left on device; free some space"):
            supernet.write(SPACE.units[1].name, candidates(1), {})
    unit_file = supernet.path / "units" / f"{SPACE.units[1].name}.safetensors"
    assert files_below(tmp_path) - before <= {unit_file}  # whole, but not named: it does not count
    again = reopened(tmp_path)
    assert_holds(again, 0)
    assert not again.has(SPACE.units[1].name)
    again.write(SPACE.units[1].name, candidates(1), {})
    assert_holds(reopened(tmp_path), 1)


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file"
    write_atomic(file, b"old")

    def fails(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(InputError, match="Read-only"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert files_below(tmp_path) == {file}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .*; choose another one"):
        write_atomic(tmp_path / "file" / "sub" / "x", b"")


def test_the_lock_lets_one_in_at_a_time_and_refresh_shows_what_it_did(tmp_path: Path) -> None:
    first, second = reopened(tmp_path), reopened(tmp_path)
    entered = threading.Event()

    def wait_and_refresh() -> None:
        with second.lock():
            entered.set()
            second.refresh()

    thread = threading.Thread(target=wait_and_refresh)
    with first.lock():
        thread.start()
        assert not entered.wait(0.3)
        for index, unit in enumerate(SPACE.units):
            first.write(unit.name, candidates(index), {})
        assert not second.complete
    thread.join(10)
    assert entered.is_set()
    assert second.complete
    assert_holds(second, 1)


def test_a_killed_owner_frees_the_lock(tmp_path: Path) -> None:
    supernet = reopened(tmp_path)
    lock = supernet.lock()
    script = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, lock.lock_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(filelock.Timeout):
            lock.acquire(timeout=0.1)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with lock.acquire(timeout=10):
        assert lock.is_locked
