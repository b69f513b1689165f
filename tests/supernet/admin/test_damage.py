"""Whatever happens to a supernet's bytes, reading gives what was written or one line: never another tensor."""

import errno
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from supernet import store, unit_file
from supernet.admin.inspection import sizes, verify
from supernet.admin.listing import listing
from supernet.errors import InputError
from supernet.manifest import unit_path
from supernet.store import Supernet
from supernet.system.records import write_record


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 20))


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 8])) + data[at + 8 :]


def without_some(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 9) :]


def with_some_twice(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + 8] + data[at:]


def with_another_digit(data: bytes, rng: random.Random) -> bytes:
    """What a manifest or a header says would still be well formed."""
    places = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    at = rng.choice(places or [0])
    return data[:at] + str(rng.randrange(10)).encode() + data[at + 1 :]


DAMAGES = (flipped, cut, longer, zeroed, without_some, with_some_twice, with_another_digit)


def outcomes(each_kind: Any) -> Counter[str]:
    """How often reading gave what was written, and how often one line."""
    seen: Counter[str] = Counter()
    try:
        supernet = each_kind.open()
    except InputError as error:
        assert "\n" not in str(error)
        return Counter({"refused": 1})
    for unit, level in each_kind.places:
        try:
            each_kind.read(supernet, unit, level)
            seen["right"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            seen["refused"] += 1
    return seen


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_is_refused_and_nothing_else(each_kind: Any, damage: Any) -> None:
    supernet, rng = each_kind.build(), random.Random(0)
    for unit in each_kind.units:
        file = unit_path(supernet.path, unit.name)
        data = file.read_bytes()
        for _ in range(12):
            file.write_bytes(broken := damage(data, rng))
            seen = outcomes(each_kind)
            assert seen["right"] >= len(each_kind.places) - 2
            assert (seen["refused"] > 0) == (broken != data)
            assert all(well for _, well in verify(each_kind.root)) == (broken == data)
        file.write_bytes(data)
    assert outcomes(each_kind) == {"right": len(each_kind.places)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_gives_no_wrong_candidate(each_kind: Any, damage: Any) -> None:
    supernet, rng = each_kind.build(model="tiny", method="Mixed"), random.Random(0)
    file = supernet.path / "manifest.json"
    data, seen = file.read_bytes(), Counter[str]()
    for _ in range(100):
        file.write_bytes(damage(data, rng))
        seen += outcomes(each_kind)
        assert supernet.path.name in listing(each_kind.root)[0]
        assert len(list(verify(each_kind.root))) == len(list(sizes(each_kind.root))) == 1
    assert seen["refused"]
    file.write_bytes(data)
    assert outcomes(each_kind) == {"right": len(each_kind.places)}


def test_files_of_units_that_were_exchanged_are_seen(each_kind: Any) -> None:
    supernet = each_kind.build()
    first, second = (unit_path(supernet.path, unit.name) for unit in list(each_kind.units)[2:4])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert outcomes(each_kind)["refused"] == 4


def test_reading_a_level_verifies_no_more_than_that_level_and_once(
    each_kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = each_kind.build()
    hashed: list[int] = []
    checksum = unit_file._checksum
    monkeypatch.setattr(unit_file, "_checksum", lambda data: hashed.append(len(data)) or checksum(data))
    file = supernet.unit_file("0.attention")
    assert hashed == [file.header_bytes]
    each_kind.read(supernet, 0, 2)
    assert sum(hashed) - file.header_bytes == sum(size for name, size in file.sizes.items() if name.startswith("2."))
    each_kind.read(supernet, 0, 1)
    assert sum(hashed) == unit_path(supernet.path, "0.attention").stat().st_size
    before = len(hashed)
    each_kind.read(supernet, 0, 1)
    each_kind.read(supernet, 0, 2)
    assert len(hashed) == before


def test_damage_to_one_level_leaves_the_others(each_kind: Any) -> None:
    supernet = each_kind.build()
    file = unit_path(supernet.path, "2.bits")
    data = bytearray(file.read_bytes())
    reader = supernet.unit_file("2.bits")
    begin = reader.header_bytes + reader._tensors["2.codes"]["data_offsets"][0]
    data[begin] ^= 1
    file.write_bytes(data)
    again = each_kind.open()
    each_kind.read(again, 4, 1)
    with pytest.raises(
        InputError, match=r"2\.bits\.safetensors is damaged: its checksum does not match the content of 2\.codes; del"
    ):
        again.candidate(4, 2)


def test_what_cannot_be_decoded_is_told(each_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: Any) -> None:
        raise ValueError("tensor 1.mask is missing")

    supernet = each_kind.build()
    monkeypatch.setattr(store, "decode", impossible)
    with pytest.raises(
        InputError, match=r"is damaged: level 1 cannot be decoded \(tensor 1\.mask is missing\); delete the folder"
    ):
        supernet.candidate(2, 1)


def test_a_tensor_that_is_not_there_is_a_value_error(each_kind: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no tensor 9\.mask"):
        each_kind.build().unit_file("1.chosen").tensor("9.mask")


def test_a_tensor_is_decoded_where_it_shall_be(each_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What crosses to a device is what is stored, not what comes of it."""
    supernet, moved = each_kind.build(), list[tuple[str, torch.device]]()

    def noting(read: Any, names: Any, level: int) -> None:
        moved.extend((name, read(name).device) for name in names)

    monkeypatch.setattr(store, "decode", noting)
    supernet.candidate(4, 1, "meta")
    assert {name for name, _ in moved} == set(supernet.unit_file("2.bits").names)
    assert all(device == torch.device("meta") for _, device in moved)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_is_not_called_damaged(each_kind: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """To delete it would be the wrong advice."""
    supernet = each_kind.build()

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fails)
        with pytest.raises(InputError, match=f"^cannot read .*0.attention.safetensors: {os.strerror(code)}$"):
            supernet.candidate(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(InputError, match=f"^cannot read .*manifest.json: {os.strerror(code)}$"):
            each_kind.open()
    unit_path(supernet.path, "0.attention").unlink()
    unit_path(supernet.path, "0.attention").mkdir()
    with pytest.raises(InputError, match="^(cannot read|the supernet file) .*0.attention.safetensors"):
        supernet.candidate(0, 1)


def test_the_entry_of_a_unit_must_be_whole(each_kind: Any) -> None:
    supernet = each_kind.build()
    file = supernet.path / "manifest.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    wrong: list[dict[str, Any]] = [
        {"bytes": "9"},
        {"bytes": 0},
        {"bytes": True},
        {"header": -3},
        {"header": 1.5},
        {"checksum": None},
        {"header": 10_000},
        {"errors": "0.5"},
        {"errors": [-0.5]},
        {"errors": [None]},
        {"errors": [True]},
        {"errors": []},
        {"errors": [0.5, 0.5]},
    ]
    for change in wrong:
        write_record(file, content | {"units": {"3": content["units"]["3"] | change}})
        with pytest.raises(InputError, match=r"is damaged: the entry of '3' is not whole"):
            each_kind.open()
    for units in ({"4": content["units"]["3"]}, {"3": {}}, {"3": 5}):
        write_record(file, content | {"units": units})
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            each_kind.open()
    write_record(file, content | {"labels": ["tiny"]})
    with pytest.raises(InputError, match=r"is damaged: its labels are none"):
        each_kind.open()


def test_a_manifest_of_another_supernet_is_seen(each_kind: Any) -> None:
    path = each_kind.build().path
    other = Supernet.open_or_create(each_kind.root, each_kind.open().space, {"model": "b"})
    other.path.mkdir()
    (other.path / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    with pytest.raises(InputError, match="is damaged: it is another supernet's"):
        other.refresh()
