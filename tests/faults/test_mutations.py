"""Three hundred files changed at random, from fixed seeds: each change is told in one line that names the file, or
harmless.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from search.run.directory import RunDirectory
from search.strategies.guided.search import GuidedState
from search.strategies.rules.front import read_front
from supernet.errors import InputError
from supernet.manifest import read_manifest
from supernet.store import Supernet
from tests.faults.runs import Runs

Rng = np.random.Generator
Read = Callable[[Path], Any]
GENERATIONS = 2


def flip_a_bit(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def change_a_digit(data: bytes, rng: Rng) -> bytes:
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return flip_a_bit(data, rng)
    changed = bytearray(data)
    place = places[int(rng.integers(len(places)))]
    changed[place] = 48 + (changed[place] - 48 + int(rng.integers(1, 10))) % 10
    return bytes(changed)


def cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data)))]


def take_out(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 40)) :]


def put_in(data: bytes, rng: Rng) -> bytes:
    texts = [b"null", b"-1", b"1e999", b'"x"', b"[" * 30_000, b"\0", b"NaN", b'{"a": 1}', b"\xff\xfe"]
    start = int(rng.integers(len(data)))
    return data[:start] + texts[int(rng.integers(len(texts)))] + data[start:]


def put_instead(data: bytes, rng: Rng) -> bytes:
    texts = [b"", b"[]", b"{}", b"null", b"3", b"[" * 100_000, b'{"checksum": "0"}', bytes(1000)]
    return texts[int(rng.integers(len(texts)))]


CHANGES = (flip_a_bit, change_a_digit, cut_off, take_out, put_in, put_instead)


def outcomes(
    original: Path, files: list[Path], read: Read, harmless: Callable[[Any, Any], bool], count: int
) -> dict[str, int]:
    """What comes of so many changes of the files below a folder, one at a time: told or harmless, anything else
    fails.
    """
    expected, found = read(original), {"told": 0, "harmless": 0}
    for seed in range(count):
        rng = np.random.default_rng(seed)
        file = files[seed % len(files)]
        data = file.read_bytes()
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        kept = file.with_name(f"{file.name}.kept")
        file.rename(kept)
        try:
            if rng.random() < 0.95:  # else the file is gone
                file.write_bytes(change(data, rng))
            said = f"{file.name}, seed {seed}, {change.__name__}"
            try:
                result = read(original)
            except InputError as error:
                assert "\n" not in str(error), said
                assert file.name in str(error) or str(file) in str(error), f"{said}: {error}"
                found["told"] += 1
            else:
                assert harmless(result, expected), said
                found["harmless"] += 1
        finally:
            file.unlink(missing_ok=True)
            kept.rename(file)
    return found


def candidates(folder: Path) -> Any:
    """All that a supernet holds; None where it is taken for one that is not built."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    supernet = Supernet(folder, manifest)
    found: list[Any] = [supernet.errors, manifest["labels"]]
    for index, unit in enumerate(supernet.space.units):
        for level in range(1, len(unit.levels)):
            values = vars(supernet.candidate(index, level))
            found.append(
                {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
            )
    return found


def same_or_not_built(result: Any, expected: Any) -> bool:
    return result is None or result == expected


def test_of_a_supernet(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    # That of the round, all of whose units have levels: a last rebuild's may be dense, and its file is then never read.
    source = max((undisturbed[0] / "net").glob("*/manifest.json"), key=lambda path: path.stat().st_size).parent
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    files = [folder / "manifest.json", *sorted((folder / "units").iterdir())]
    found = outcomes(folder, files, candidates, same_or_not_built, 150)
    assert found["told"] > 120


def test_of_a_run(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0] / "run", folder)
    record = json.loads((folder / "checkpoint/round-0.json").read_text())
    manifests = [read_manifest(path.parent) for path in (undisturbed[0] / "net").glob("*/manifest.json")]
    spaces = [Supernet(folder, manifest).space for manifest in manifests if manifest is not None]
    space = next(one for one in spaces if one.fingerprint == record["space"])
    settings, identity = (
        {
            key: value
            for key, value in json.loads((folder / f"checkpoint/{name}.json").read_text()).items()
            if key != "checksum"
        }
        for name in ("settings", "identity")
    )

    def everything(path: Path) -> Any:
        directory = RunDirectory(path, settings, fresh=False)
        directory.identify(identity)
        state = directory.load_state(0, space, GENERATIONS, GuidedState)
        others = [directory.read(name) for name in ("metrics.json", "allocation.json", "checkpoint/supernets.json")]
        return [str(state), directory.history().to_dict("records"), *others, directory.costs()]

    def made_again(result: Any, expected: Any) -> bool:
        """State and rows are what they were; of the rest, what is gone is made again."""
        return result[:2] == expected[:2] and all(
            a == b or not a for a, b in zip(result[2:], expected[2:], strict=True)
        )

    names = ("round-0", "settings", "identity", "costs", "supernets")
    files = [
        *(folder / f"checkpoint/{name}.json" for name in names),
        folder / "metrics.json",
        folder / "allocation.json",
    ]
    found = outcomes(folder, [*files, folder / "history.parquet"], everything, made_again, 100)
    assert found["told"] > 70


def test_of_a_front(runs: Runs, tmp_path: Path) -> None:
    runs(tmp_path, arguments=["strategy=pareto", "strategy.points=2", "stages=[build,search]"], status=0)
    file = tmp_path / "run/front.json"

    def points(folder: Path) -> Any:
        return [dict(point) for point in read_front(str(folder / "front.json"))]

    found = outcomes(tmp_path / "run", [file], points, lambda result, expected: bool(result == expected), 50)
    assert found["told"] > 40


def test_the_changes_are_changes() -> None:
    """Else the tests above would show nothing."""
    rng = np.random.default_rng(0)
    for change in CHANGES:
        data = b'{"a": 12345, "b": [1, 2, 3], "c": "' + b"x" * 500 + b'"}'
        assert change(data, rng) != data


@pytest.mark.slow
def test_of_a_supernet_many_more(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    for source in (undisturbed[0] / "net").glob("*/manifest.json"):
        folder = tmp_path / source.parent.name
        shutil.copytree(source.parent, folder)
        files = [folder / "manifest.json", *sorted((folder / "units").iterdir())]
        outcomes(folder, files, candidates, same_or_not_built, 1500)
