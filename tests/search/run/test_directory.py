"""A run's directory knows what it holds, and loses nothing to a kill."""

import json
import mmap
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from search.budgets.costs import CostTable
from search.run.directory import locked
from supernet.errors import InputError
from supernet.space import Level, Space, Unit
from supernet.system.atomic import _this_machine
from supernet.system.records import read_record, write_record
from tests.search.run.small import RNG, SPACE, advance, opened, state


def test_latencies_of_a_run_stay_what_they_were_when_it_is_resumed(run: Path) -> None:
    table = CostTable(((5, 2, 1), (5, 2, 0)), 7)
    opened(run).keep_latencies(SPACE, table)
    assert opened(run).latencies(SPACE) == table
    assert opened(run).latencies(Space(SPACE.units[:1])) is None


def test_latencies_of_a_run_that_never_began_may_be_of_other_settings(tmp_path: Path) -> None:
    opened(tmp_path).keep_latencies(SPACE, CostTable(((5, 2, 1), (5, 2, 0)), 7))
    assert opened(tmp_path).latencies(SPACE) is None


def test_equal_settings_go_on(run: Path) -> None:
    assert opened(run).load_state(0, SPACE, 9) == state(1)
    assert opened(run, strategy={"tokens": (64, 256)}).load_state(0, SPACE, 9) == state(1)  # JSON knows no tuples


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, "(seed: 0 there, 1 now)"),
        ({"budget": {"sparsity": 0.25}}, "(budget.sparsity: 0.5 there, 0.25 now)"),
        ({"budget": {}}, "(budget.sparsity: 0.5 there, null now)"),
        ({"added": "x"}, '(added: null there, "x" now)'),
        (
            {"strategy": {"tokens": [64]}, "seed": 2},
            "(seed: 0 there, 2 now, strategy.tokens: [64, 256] there, [64] now)",
        ),
    ],
)
def test_other_settings_are_refused(run: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as refusal:
        opened(run, **changed)
    assert f"{run} holds a run with other settings {told};" in str(refusal.value)


def test_another_kind_of_thing_is_one_change(tmp_path: Path) -> None:
    """Not one for each of its settings, which the other kind has not."""
    advance(opened(tmp_path, prune={"_target_": "a.One", "damping": 0.1}), 0, 1.0)
    with pytest.raises(InputError) as refusal:
        opened(tmp_path, prune={"_target_": "a.Two", "norm": 2})
    assert "(prune: a.One there, a.Two now)" in str(refusal.value)


def test_a_directory_without_results_takes_any_settings(tmp_path: Path) -> None:
    opened(tmp_path).write("checkpoint/identity.json", {})
    with pytest.raises(InterruptedError), opened(tmp_path).stage("build"):
        raise InterruptedError
    advance(opened(tmp_path, seed=1), 0, 1.0)
    with pytest.raises(InputError):
        opened(tmp_path)


def test_a_finished_stage_claims_the_directory(tmp_path: Path) -> None:
    with opened(tmp_path).stage("build"):
        pass
    with pytest.raises(InputError):
        opened(tmp_path, seed=1)


def test_a_state_comes_back_as_it_was(run: Path) -> None:
    found = opened(run).load_state(0, SPACE, 9)
    assert found == state(1) and isinstance(found.parent, tuple)
    assert opened(run).load_state(1, SPACE, 9) is None


def test_the_history_grows_by_generation_and_round(run: Path) -> None:
    directory = opened(run)
    advance(directory, 1, 0.9)
    advance(directory, 0, 0.8, iteration=1)
    history = opened(run).history()
    assert history[["iteration", "generation", "fitness"]].to_numpy().tolist() == [
        [0, 0, 1.0],
        [0, 1, 0.9],
        [1, 0, 0.8],
    ]
    assert history.allocation.tolist() == ["1 2"] * 3
    assert [str(kind) for kind in history.dtypes[:4]] == ["int32", "int32", "int32", "int64"]


def test_a_generation_done_again_replaces_its_rows(run: Path) -> None:
    """A kill between history and checkpoint leaves rows of a generation that the checkpoint does not know."""
    directory = opened(run)
    advance(directory, 1, 0.9)
    (run / "checkpoint/round-0.json").unlink()
    advance(opened(run), 0, 0.5)
    assert opened(run).history().fitness.tolist() == [0.5]
    advance(opened(run), 0, 0.4, iteration=1)
    assert opened(run).history().fitness.tolist() == [0.5, 0.4]  # another round's rows stay


def test_an_exhausted_search_adds_no_rows(run: Path) -> None:
    directory = opened(run)
    directory.save_state(0, SPACE, state(1), [])
    assert directory.history().fitness.tolist() == [1.0]  # nor does it take those of the last generation


def test_a_failed_write_leaves_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = opened(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"history\.parquet: No space left"):
        advance(directory, 1, 0.9)
    with pytest.raises(InputError, match=r"metrics\.json: No space left"):
        directory.write("metrics.json", {})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_costs_of_a_stage_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 100.0, 101.0, 200.0, 204.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for name in ("build", "search", "build"):
        with opened(tmp_path).stage(name):
            pass
    costs = opened(tmp_path).costs()
    assert {name: cost["seconds"] for name, cost in costs.items()} == {"build": 6.5, "search": 1.0}
    assert all(cost["peak_memory_bytes"] > 1e7 for cost in costs.values())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts a process's peak alone")
def test_the_peak_of_a_stage_is_its_own(tmp_path: Path) -> None:
    with opened(tmp_path).stage("build"):
        with mmap.mmap(-1, 400_000_000) as pages:  # fresh ones, which no allocator keeps
            pages.write(bytes(400_000_000))
    with opened(tmp_path).stage("search"):
        pass
    costs = opened(tmp_path).costs()
    assert costs["build"]["peak_memory_bytes"] > costs["search"]["peak_memory_bytes"] + 300_000_000
    assert {cost["peak_memory_of"] for cost in costs.values()} == {"stage"}


def test_where_the_system_cannot_tell_it_is_named_the_peak_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.run.directory.restart_peak", lambda: False)
    with opened(tmp_path).stage("build"):
        pass
    assert opened(tmp_path).costs()["build"]["peak_memory_of"] == "process"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"parent": [1]}', "3"])
def test_a_damaged_checkpoint_is_refused(run: Path, content: str) -> None:
    (run / "checkpoint/round-0.json").write_text(content)
    with pytest.raises(InputError, match=r"round-0\.json is damaged .*; start over with fresh=true"):
        opened(run).load_state(0, SPACE, 9)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parent": [0, 3]}, "its allocation has levels that there are not"),
        ({"parent": [0, -1]}, "'-1' is no whole number"),
        ({"parent": [0]}, "its allocation has levels that there are not"),
        ({"parent": [0, 1.0]}, "'1.0' is no whole number"),
        ({"parent": [0, True]}, "'True' is no whole number"),
        ({"parent": 3}, "not iterable"),
        ({"generation": 10}, "it is of generation 10 of 9"),
        ({"generation": "1"}, "is no whole number"),
        ({"tokens": -1}, "is no whole number"),
        ({"exhausted": 100}, "another type"),
        ({"fitness": "0.25"}, "another type"),
        ({"state": 3}, ""),
        ({"rng": {"bit_generator": "MT19937"}}, "PCG64"),
        ({"rng": RNG | {"has_uint32": "x"}}, ""),
        ({"rng": 3}, ""),
        ({"rows": None}, "is no whole number"),
        ({"more": 1}, "it is not what this strategy remembers"),
    ],
)
def test_a_checkpoint_that_no_search_wrote_is_refused(run: Path, change: dict[str, Any], why: str) -> None:
    """With a checksum that is right: what is read is checked for what it means, too, and no supernet is blamed."""
    file = run / "checkpoint/round-0.json"
    content = read_record(file)
    assert content is not None
    outside = {key: value for key, value in change.items() if key in content}
    inside = {key: value for key, value in change.items() if key not in content}
    write_record(file, content | {"state": content["state"] | inside} | outside)
    with pytest.raises(InputError) as refusal:
        opened(run).load_state(0, SPACE, 9)
    assert str(refusal.value).startswith(f"{file} is damaged (") and why in str(refusal.value)
    assert str(refusal.value).endswith("; start over with fresh=true")


FILES = {
    name: "start over with fresh=true" for name in ("settings.json", "identity.json", "round-0.json", "latency-{}.json")
}
FILES |= {
    name: "delete it, and the same command writes a new one"
    for name in ("costs.json", "supernets.json", "identifier.json")
}


def read_all(run: Path) -> None:
    directory = opened(run)
    directory.identify({"model": "a1"})
    directory.latencies(SPACE)
    directory.load_state(0, SPACE, 9)
    directory.costs()
    directory.note_supernet("0", run)
    directory.read("checkpoint/identifier.json")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda text: text.replace("1", "2", 1), "it was changed since it was written: its checksum does not match"),
        (lambda text: text.replace('"checksum"', '"sum"'), "it has no checksum: it is of an earlier version"),
        (lambda text: "[" * 100_000, "it is no JSON: maximum recursion depth exceeded"),
        (lambda text: text[:-9], "it is no JSON: "),
        (lambda text: "[]", "it holds no object"),
        (lambda text: '{"a": ' + "9" * 5000 + "}", "it is no JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_run_is_verified(run: Path, name: str, harm: Callable[[str], str], why: str) -> None:
    shutil.rmtree(run)
    directory = opened(run)
    directory.identify({"model": "a1"})
    directory.note_supernet("1", run)
    directory.write("checkpoint/identifier.json", {"run": "1"})
    advance(directory, 0, 1.0)
    directory.keep_latencies(SPACE, CostTable(((5, 2, 1), (5, 2, 0)), 7))
    with directory.stage("search"):
        pass
    read_all(run)
    file = run / "checkpoint" / name.format(SPACE.fingerprint)
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text)))  # laid out in another way: that is no change
    read_all(run)
    file.write_text(harm(text))
    with pytest.raises(InputError) as refusal:
        read_all(run)
    assert str(refusal.value).startswith(f"{file} is damaged ({why}") and str(refusal.value).endswith(
        f"; {FILES[name]}"
    )


def test_a_checkpoint_of_another_format_is_told_as_that(run: Path) -> None:
    file = run / "checkpoint/round-0.json"
    write_record(file, (read_record(file) or {}) | {"format": 1})
    with pytest.raises(InputError, match=r"round-0\.json has format 1, not 2; start over with fresh=true$"):
        opened(run).load_state(0, SPACE, 9)


@pytest.mark.parametrize("name", ["settings.json", "identity.json", "round-0.json", "round-1.json", "latency-{}.json"])
def test_a_file_that_was_deleted_is_missed(run: Path, name: str) -> None:
    shutil.rmtree(run)
    directory = opened(run)
    directory.identify({"model": "a1"})
    for generation, iteration in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        advance(directory, generation, 0.5, iteration)
    directory.keep_latencies(SPACE, CostTable(((5, 2, 1), (5, 2, 0)), 7))
    read_all(run)
    file = run / "checkpoint" / name.format(SPACE.fingerprint)
    file.unlink()
    with pytest.raises(InputError) as refusal:
        read_all(run)
        opened(run).load_state(1, SPACE, 9)
    assert (
        str(refusal.value) == f"{file} is missing, without which the run there cannot go on; start over with fresh=true"
    )


def test_rows_of_a_generation_that_was_killed_are_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for generation, iteration in [(1, 0), (0, 1)]:
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr("search.run.directory.write_record", interrupted)
            advance(opened(run), generation, 9.0, iteration)
        directory = opened(run)
        found = directory.load_state(iteration, SPACE, 9)
        assert (found is None) == (iteration == 1)
        advance(directory, generation, 0.5, iteration)
    assert opened(run).history().fitness.tolist() == [1.0, 0.5, 0.5]


def interrupted(*_: object) -> None:
    raise InterruptedError


def changed(run: Path) -> None:
    table = pd.read_parquet(run / "history.parquet")
    table.loc[0, "fitness"] = 0.5
    table.to_parquet(run / "history.parquet", index=False)


def emptied(run: Path) -> None:
    pd.read_parquet(run / "history.parquet")[:0].to_parquet(run / "history.parquet", index=False)


HARMS: list[tuple[Callable[[Path], object], str]] = [
    (lambda run: (run / "history.parquet").unlink(), "is missing; start"),
    (changed, "has not the rows that the run wrote; start"),
    (emptied, "has not the rows that the run wrote; start"),
    (lambda run: (run / "history.parquet").write_bytes(b"not parquet"), "is damaged ("),
    (lambda run: pd.DataFrame({"a": [1]}).to_parquet(run / "history.parquet"), "is damaged (its columns are not"),
]


@pytest.mark.parametrize(("harm", "why"), HARMS)
def test_a_history_that_is_not_the_run_s_is_refused(run: Path, harm: Callable[[Path], object], why: str) -> None:
    harm(run)
    with pytest.raises(InputError) as refusal:
        opened(run).load_state(0, SPACE, 9)
    message = str(refusal.value)
    assert (
        f"history.parquet {why}" in message and message.endswith("start over with fresh=true") and "\n" not in message
    )


def test_every_damaged_byte_of_a_history_is_seen_or_harmless(run: Path) -> None:
    file, rng = run / "history.parquet", random.Random(0)
    data, expected, refused = file.read_bytes(), opened(run).history(), 0
    for _ in range(150):
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            opened(run).load_state(0, SPACE, 9)
            pd.testing.assert_frame_equal(opened(run).history(), expected)
        except InputError as error:
            assert "\n" not in str(error) and "history.parquet" in str(error) and str(error).endswith("fresh=true")
            refused += 1
    assert refused > 30


def test_what_dead_processes_left_is_swept_away(run: Path) -> None:
    dead, alive = (f"{_this_machine()}-{process}-00000000.tmp" for process in (999_999_999, os.getpid()))
    for folder in (run, run / "checkpoint"):
        (folder / f".x.{dead}").touch()
        (folder / f".x.{alive}").touch()
    with locked(run):
        left = [file.name for file in run.rglob("*.tmp")]
    assert left == [f".x.{alive}"] * 2


def test_a_search_among_other_levels_is_refused(run: Path) -> None:
    other = Space((Unit("unit.0", "mlp", 4, (Level(4, 8), Level(1, 2))),))
    with pytest.raises(InputError, match=r"round-0\.json is of a search among other levels"):
        opened(run).load_state(0, other, 9)


def test_another_model_or_text_is_refused(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    directory.identify({"model": "a", "data": {"search": "x"}})
    advance(directory, 0, 1.0)
    opened(tmp_path).identify({"model": "a", "data": {"search": "x"}})
    with pytest.raises(InputError, match=r'data\.search: "x" there, "y" now'):
        opened(tmp_path).identify({"model": "a", "data": {"search": "y"}})


def test_a_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
        pass
