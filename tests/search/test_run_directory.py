"""A run's directory knows what it holds, and loses nothing to a kill."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from search.costs import CostTable
from search.run_directory import RunDirectory, locked
from search.strategies.base import Row, State
from supernet.errors import InputError
from supernet.space import Level, Space, Unit

SPACE = Space((Unit("unit", "mlp", 4, (Level(4, 8), Level(2, 4))),))
SETTINGS = {"seed": 0, "budget": {"sparsity": 0.5}, "strategy": {"tokens": [64, 256]}}


def opened(path: Path, fresh: bool = False, **settings: Any) -> RunDirectory:
    return RunDirectory(path, SETTINGS | settings, fresh)


def state(generation: int, parent: tuple[int, ...] = (1, 2)) -> State:
    return State(parent, 0.25, generation, 1000, {"bit_generator": "PCG64", "state": {"state": 2**100, "inc": 1}})


def row(generation: int, fitness: float, step: int = 0) -> Row:
    return Row(generation, step, 64, fitness, True, 0.5, (1, 2))


def advance(directory: RunDirectory, generation: int, fitness: float, iteration: int = 0) -> None:
    """A generation whose one row has this fitness."""
    directory.save_state(iteration, SPACE, state(generation + 1), [row(generation, fitness)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has searched one generation."""
    advance(opened(tmp_path / "run"), 0, 1.0)
    return tmp_path / "run"


def test_latencies_of_a_run_stay_what_they_were_when_it_is_resumed(run: Path) -> None:
    table = CostTable(((5, 2),), 7)
    opened(run).keep_latencies(SPACE, table)
    assert opened(run).latencies(SPACE) == table
    assert opened(run).latencies(Space((*SPACE.units, *SPACE.units))) is None


def test_latencies_of_a_run_that_never_began_may_be_of_other_settings(tmp_path: Path) -> None:
    opened(tmp_path).keep_latencies(SPACE, CostTable(((5, 2),), 7))
    assert opened(tmp_path).latencies(SPACE) is None


def test_equal_settings_go_on(run: Path) -> None:
    assert opened(run).load_state(0, SPACE) == state(1)
    assert opened(run, strategy={"tokens": (64, 256)}).load_state(0, SPACE) == state(1)  # JSON knows no tuples


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, "(seed: 0 there, 1 now)"),
        ({"budget": {"sparsity": 0.25}}, "(budget.sparsity: 0.5 there, 0.25 now)"),
        ({"budget": {}}, "(budget.sparsity: 0.5 there, null now)"),
        ({"added": "x"}, '(added: null there, "x" now)'),
        ({"strategy": {"tokens": [64]}, "seed": 2}, "(seed: 0 there, 2 now, strategy.tokens: [64, 256] there, [64] now)"),
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


def test_fresh_moves_each_run_aside(run: Path) -> None:
    advance(opened(run, fresh=True, seed=1), 0, 2.0)
    assert opened(run, seed=1).history().fitness.tolist() == [2.0]
    advance(opened(run, fresh=True, seed=2), 0, 3.0)
    found = {path.name: pd.read_parquet(path / "history.parquet").fitness.tolist() for path in run.parent.iterdir()}
    assert found == {"run": [3.0], "run.old-1": [1.0], "run.old-2": [2.0]}
    assert opened(run.with_name("run.old-1")).load_state(0, SPACE) == state(1)


def test_fresh_moves_all_results_and_leaves_the_rest(run: Path) -> None:
    (run / "export").mkdir()
    (run / "export/model").touch()
    for name in ("allocation.json", "metrics.json", "search.log"):
        (run / name).touch()
    opened(run, fresh=True)
    assert {path.name for path in run.iterdir()} == {"search.log"}
    moved = {path.name for path in run.with_name("run.old-1").iterdir()}
    assert moved == {"export", "allocation.json", "metrics.json", "history.parquet", "checkpoint"}


def test_fresh_has_nothing_to_move_in_a_new_directory(tmp_path: Path) -> None:
    opened(tmp_path / "new", fresh=True)
    assert list(tmp_path.iterdir()) == []


def test_a_state_comes_back_as_it_was(run: Path) -> None:
    found = opened(run).load_state(0, SPACE)
    assert found == state(1) and isinstance(found.parent, tuple)
    assert opened(run).load_state(1, SPACE) is None


def test_the_history_grows_by_generation_and_round(run: Path) -> None:
    directory = opened(run)
    advance(directory, 1, 0.9)
    advance(directory, 0, 0.8, iteration=1)
    history = opened(run).history()
    assert history[["iteration", "generation", "fitness"]].to_numpy().tolist() == [[0, 0, 1.0], [0, 1, 0.9], [1, 0, 0.8]]
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
        assert len(b"x" * 400_000_000) == 400_000_000
    with opened(tmp_path).stage("search"):
        pass
    costs = opened(tmp_path).costs()
    assert costs["build"]["peak_memory_bytes"] > costs["search"]["peak_memory_bytes"] + 300_000_000
    assert {cost["peak_memory_of"] for cost in costs.values()} == {"stage"}


def test_where_the_system_cannot_tell_it_is_named_the_peak_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.run_directory.restart_peak", lambda: False)
    with opened(tmp_path).stage("build"):
        pass
    assert opened(tmp_path).costs()["build"]["peak_memory_of"] == "process"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"parent": [1]}', "3"])
def test_a_damaged_checkpoint_is_refused(run: Path, content: str) -> None:
    (run / "checkpoint/round-0.json").write_text(content)
    with pytest.raises(InputError, match=r"round-0\.json is damaged .*; delete it, or start over with fresh=true"):
        opened(run).load_state(0, SPACE)


def test_a_damaged_history_is_refused(run: Path) -> None:
    (run / "history.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"history\.parquet is damaged"):
        opened(run).history()


def test_a_search_among_other_levels_is_refused(run: Path) -> None:
    other = Space((Unit("unit", "mlp", 4, (Level(4, 8), Level(1, 2))),))
    with pytest.raises(InputError, match=r"round-0\.json is of a search among other levels"):
        opened(run).load_state(0, other)


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
