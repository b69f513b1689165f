"""The command line from end to end on a tiny model: what it leaves, and how it goes on."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import numpy as np
import pandas as pd
import pytest

from search.paths import CACHE_VARIABLE
from search.run.directory import locked

Call = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]

SMOKE = "+experiment=smoke"
RUN = Path("outputs/search/smoke")
ROUNDS, GENERATIONS, OFFSPRING, SEARCH_TOKENS = 2, 8, 8, 1024  # of the smoke experiment
HIDDEN = 64  # of its model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Fresh processes work with one thread, as this one does: the order of sums, and so their last bits,
    depends on it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def results(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for its lock and the logs of Hydra."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and ".hydra" not in path.parts and path.name not in ("search.log", ".lock")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """What two runs share; `call` checks no export in a process of its own."""
    beside = ("stages", "export", "checksum", "continuations")  # the last are of a command that asked for them
    return {key: value for key, value in metrics.items() if key not in beside}


def history(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "history.parquet")


def levels(folder: Path) -> list[int]:
    return [unit["level"] for unit in read(folder / "allocation.json")["units"]]


# What a run leaves


def test_a_run_leaves_the_files_of_the_contract(finished: Path) -> None:
    run = finished / RUN
    names = {"allocation.json", "history.parquet", "metrics.json", "checkpoint", "export"}
    assert {path.name for path in run.iterdir()} - {".hydra", ".lock", "search.log"} == names
    assert {path.name for path in (run / "checkpoint").iterdir()} == {
        "settings.json",
        "identity.json",
        "costs.json",
        "supernets.json",
        "round-0.json",
        "round-1.json",
    }
    files = {
        "config.json",
        "model.safetensors",
        "modeling_pruned.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert files <= {path.name for path in (run / "export").iterdir()}
    assert not [path for path in finished.rglob("*") if path.name.endswith(".tmp")]


def test_the_allocation_is_consistent_and_meets_the_budget(finished: Path) -> None:
    content = read(finished / RUN / "allocation.json")
    assert content.keys() == {"format", "model", "space", "budget", "units", "checksum"}
    assert (content["format"], content["model"]["name"]) == (1, "random-llama-0")
    budget, units = content["budget"], content["units"]
    assert budget.keys() == {"kind", "target", "dense", "achieved"}
    assert budget["target"] == 0.75 * budget["dense"]
    each = {
        "attention": 2 * HIDDEN * 24,
        "mlp": 3 * HIDDEN,
    }  # parameters of a KV group (q 16, k 8, v 8, o 16) and a neuron
    for unit in units:
        assert unit.keys() == {"name", "kind", "level", "sparsity", "kept", "total", "cost"}
        assert unit["cost"] == unit["kept"] * each[unit["kind"]]
        assert unit["sparsity"] == pytest.approx(1 - unit["kept"] / unit["total"])
        assert (unit["level"] == 0) == (unit["kept"] == unit["total"])
    modules = [f"model.layers.{block}.{module}" for block in range(4) for module in ("self_attn", "mlp")]
    assert [unit["name"] for unit in units] == modules
    assert budget["achieved"] == sum(unit["cost"] for unit in units)
    assert 0 <= budget["target"] - budget["achieved"] < each["mlp"] * 32  # within a level of the last round's 1/8
    assert budget["dense"] == sum(unit["total"] * each[unit["kind"]] for unit in units)


def test_the_history_has_a_row_for_each_evaluation(finished: Path) -> None:
    rows = history(finished / RUN)
    columns = ["iteration", "generation", "step", "tokens", "fitness", "survived", "seconds", "allocation"]
    assert list(rows.columns) == columns
    steps = {key: group for key, group in rows.groupby(["iteration", "generation", "step"])}
    assert {(i, g) for i, g, _ in steps} == {(i, g) for i in range(ROUNDS) for g in range(GENERATIONS)}
    for (iteration, generation, step), group in steps.items():
        later = steps.get((iteration, generation, step + 1))
        assert len(group) <= OFFSPRING + 1 if step == 0 else len(group) >= 2  # the parent takes part in each step
        assert group.tokens.nunique() == 1
        assert group.allocation.is_unique
        if later is None:
            assert len(group) == 2 and group.survived.sum() == 1  # the leader is judged against the parent
        else:
            assert set(group[group.survived].allocation) <= set(later.allocation)
    assert np.isfinite(rows.fitness).all() and (rows.fitness > 0).all() and (rows.seconds > 0).all()
    last = rows[rows.survived].iloc[-1]
    assert [int(level) for level in last.allocation.split()] == levels(finished / RUN)


def test_the_metrics_agree_with_the_allocation(finished: Path) -> None:
    metrics, allocation = read(finished / RUN / "metrics.json"), read(finished / RUN / "allocation.json")
    removed = allocation["budget"]["dense"] - allocation["budget"]["achieved"]
    norms = HIDDEN * sum(unit["kept"] == 0 for unit in allocation["units"])
    dense, uniform, searched = metrics["dense"], metrics["uniform"], metrics["searched"]
    assert dense["parameters"] - searched["parameters"] == removed + norms
    assert dense["parameters"] - uniform["parameters"] >= allocation["budget"]["dense"] - allocation["budget"]["target"]
    assert abs(dense["kl_divergence"]) < 1e-5
    for model in (uniform, searched):
        assert model["kl_divergence"] > 0.001
    assert all(1 < model["perplexity"] < 10_000 for model in (dense, uniform, searched))
    assert metrics["evaluation_tokens"] == 8 * 64
    gradients = 3 * SEARCH_TOKENS * GENERATIONS * ROUNDS  # at most
    assert 0 < metrics["search_forward_tokens"] <= history(finished / RUN).tokens.sum() + gradients
    assert metrics["stages"].keys() == {"build", "search", "evaluate", "export"}
    assert all(cost["seconds"] >= 0 and cost["peak_memory_bytes"] > 1e8 for cost in metrics["stages"].values())


def test_the_split_of_the_data_is_recorded(finished: Path) -> None:
    record = read(finished / RUN / "checkpoint/identity.json")["data"]
    assert {part: entry["sequences"] for part, entry in record.items()} == {
        "calibration": 16,
        "search": 16,
        "evaluation": 8,
    }
    assert len({entry["fingerprint"] for entry in record.values()}) == 3


# The same command again, other settings, single stages, sweeps


def test_the_same_command_again_does_nothing_twice(copy: Path, call: Call) -> None:
    shutil.rmtree(copy / "cache")  # a finished run needs no supernet
    before = results(copy)
    process = call(SMOKE)
    assert process.returncode == 0
    assert results(copy) == before  # with the seconds of each stage, and no new supernet
    assert "searched" in process.stdout


def test_a_model_that_the_device_has_no_room_for_is_measured_block_by_block(copy: Path, call: Call) -> None:
    metrics = copy / RUN / "metrics.json"
    whole = json.loads(metrics.read_text())
    metrics.unlink()
    assert call(SMOKE, "stages=[evaluate]", "evaluator.resident=blocks", "evaluator.memory=100kB").returncode == 0
    streamed = json.loads(metrics.read_text())
    for model in ("dense", "uniform", "searched"):
        assert streamed[model] == pytest.approx(whole[model], rel=1e-3, abs=1e-6)


def test_other_settings_are_refused_with_both_values(copy: Path, call: Call, refusal: Refusal) -> None:
    before = results(copy)
    line = refusal(call(SMOKE, "budget.sparsity=0.5", "strategy.offspring=4"))
    for part in (str(RUN), "budget.sparsity: 0.25 there, 0.5 now", "strategy.offspring: 8 there, 4 now", "fresh=true"):
        assert part in line
    assert "seed" not in line
    assert results(copy) == before


def test_what_results_do_not_depend_on_may_change(copy: Path, call: Call) -> None:
    before = results(copy)
    assert call(SMOKE, "device=cpu", "stages=[evaluate]").returncode == 0
    assert results(copy) == before


def test_fresh_moves_a_run_aside(copy: Path, call: Call) -> None:
    before = results(copy / RUN)
    assert call(SMOKE, "fresh=true", "budget.sparsity=0.5").returncode == 0
    assert results(copy / f"{RUN}.old-1") == before
    budget = read(copy / RUN / "allocation.json")["budget"]
    assert budget["target"] == 0.5 * budget["dense"]


SHARED = ("budget.sparsity=0.5", "strategy.offspring=4")
APART = (
    "prune.fit=dense",
    "prune.accumulation=none",
    "prune.query_heads=true",
    "supernet.lowest=0.125",
    "seed=1",
    "model.seed=1",
    "prune.pruner.damping=0.1",
    "supernet.levels=4",
)


@pytest.mark.parametrize(
    ("change", "supernets"),
    [
        pytest.param(change, number, marks=[] if change in (SHARED[0], APART[0]) else [pytest.mark.slow])
        for changes, number in ((SHARED, 1), (APART, 2))
        for change in changes
    ],
)
def test_a_supernet_is_shared_by_settings_that_its_candidates_do_not_depend_on(
    change: str, supernets: int, call: Call, empty_cache: Path
) -> None:
    for run, settings in (("one", []), ("other", [change])):
        assert call(SMOKE, "stages=[build]", f"hydra.run.dir={run}", *settings).returncode == 0
    assert len(list(empty_cache.glob("supernets/*/manifest.json"))) == supernets


@pytest.mark.parametrize(("accumulation", "supernets"), [("none", 1), ("expectation", 1), ("chosen", 2)])
def test_what_candidates_see_depends_on_the_budget_only_along_an_allocation(
    accumulation: str, supernets: int, call: Call, empty_cache: Path
) -> None:
    for sparsity in (0.25, 0.5):
        settings = (f"prune.accumulation={accumulation}", f"budget.sparsity={sparsity}", f"hydra.run.dir={sparsity}")
        assert call(SMOKE, "stages=[build]", *settings).returncode == 0
    assert len(list(empty_cache.glob("supernets/*/manifest.json"))) == supernets


def test_another_seed_finds_something_else(finished: Path, call: Call, tmp_path: Path) -> None:
    assert call(SMOKE, "seed=1", "stages=[build,search]").returncode == 0
    assert history(tmp_path / RUN).fitness.tolist() != history(finished / RUN).fitness.tolist()


def test_a_mistake_does_not_claim_the_directory(call: Call, tmp_path: Path, refusal: Refusal) -> None:
    refusal(call(SMOKE, "budget.sparsity=1.5"))
    refusal(call(SMOKE, "prune.fit=well"))
    assert call(SMOKE, "dry_run=true", "seed=1").returncode == 0
    assert call(SMOKE, "stages=[build,search]").returncode == 0
    assert (tmp_path / RUN / "allocation.json").exists()


def test_a_dry_run_moves_nothing_aside(copy: Path, call: Call) -> None:
    before = results(copy / RUN)
    assert call(SMOKE, "dry_run=true", "fresh=true").returncode == 0
    assert results(copy / RUN) == before


def test_a_run_at_work_is_not_moved_aside(copy: Path, call: Call, refusal: Refusal) -> None:
    before = results(copy / RUN)
    with locked(copy / RUN):
        assert "in use by another process" in refusal(call(SMOKE, "fresh=true"))
    assert results(copy / RUN) == before


def test_stages_that_need_a_search_say_so(call: Call, refusal: Refusal) -> None:
    assert "add search to stages" in refusal(call(SMOKE, "stages=[build,evaluate,export]"))


def test_a_budget_that_leaves_nothing_is_told(call: Call) -> None:
    process = call(SMOKE, "budget.sparsity=0.99", "strategy=uniform", "rounds=1", "stages=[build,search]")
    assert process.returncode == 0 and "nothing is kept of any unit" in process.stdout + process.stderr


def test_another_text_under_the_same_name_is_refused(call: Call, tmp_path: Path, refusal: Refusal) -> None:
    text, command = tmp_path / "text.txt", (SMOKE, "data=local", "data.source.path=text.txt", "stages=[build]")
    text.write_text("\n\n".join(f"The {n}th paragraph of a text on numbers such as {n * n}." for n in range(400)))
    assert call(*command).returncode == 0
    text.write_text(text.read_text().replace("paragraph", "sentence"))
    assert "another model or text" in refusal(call(*command))


def test_a_dry_run_describes_and_builds_nothing(call: Call, empty_cache: Path, tmp_path: Path) -> None:
    process = call(SMOKE, "dry_run=true")
    assert process.returncode == 0
    for part in (
        "8 units",
        "184,320 of 245,760",
        " s, ",
        "on disk",
        "for the model",
        "for activations",
        "forward tokens",
    ):
        assert part in process.stdout
    assert not empty_cache.exists() and results(tmp_path) == {}


@pytest.mark.sampled(0)
@pytest.mark.parametrize(
    ("strategy", "looks_at"),
    [
        ("uniform", "the rule looks at the budget alone"),
        ("alpha_pruning", "the rule looks at the weights alone"),
        ("owl", "the rule looks at the calibration text once"),
        (
            "adapt_pruner",  # which looks at candidates, too
            "in each of 2 rounds the rule looks at strategy.sequences of the calibration text, at most "
            "strategy.steps times",
        ),
    ],
)
def test_a_dry_run_promises_no_measurements_of_a_rule(
    strategy: str, looks_at: str, call: Call, empty_cache: Path
) -> None:
    process = call(SMOKE, "dry_run=true", f"strategy={strategy}", "rounds=2")
    assert (process.returncode, process.stderr) == (0, "")
    assert f"search: no allocation is measured; {looks_at}\n" in process.stdout


def test_stages_one_by_one_give_the_same_as_all_at_once(
    call: Call, empty_cache: Path, finished: Path, tmp_path: Path, refusal: Refusal
) -> None:
    line = refusal(call(SMOKE, "stages=[search]"))
    assert str(empty_cache) in line and "add build to stages" in line
    assert call(SMOKE, "stages=[build]").returncode == 0
    assert not (tmp_path / RUN / "history.parquet").exists()
    assert call(SMOKE, "stages=[build,search]").returncode == 0
    assert not (tmp_path / RUN / "metrics.json").exists() and not (tmp_path / RUN / "export").exists()
    assert call(SMOKE, "stages=[evaluate]").returncode == 0
    assert not (tmp_path / RUN / "export").exists()
    assert call(SMOKE, "stages=[export]").returncode == 0
    ours, theirs = results(tmp_path / RUN), results(finished / RUN)
    assert ours.keys() == theirs.keys()
    for name in ("allocation.json", "export/model.safetensors", "export/config.json"):
        assert ours[name] == theirs[name], name
    metrics, expected = read(tmp_path / RUN / "metrics.json"), read(finished / RUN / "metrics.json")
    assert metrics["stages"].keys() == expected["stages"].keys()
    assert without_times(metrics) == without_times(expected)


def test_a_sweep_runs_each_budget_in_its_own_directory(call: Call, tmp_path: Path) -> None:
    assert call("-m", SMOKE, "budget.sparsity=0.25,0.5", "stages=[build,search]").returncode == 0
    targets = {path.parent.name: read(path)["budget"] for path in (tmp_path / RUN).glob("*/allocation.json")}
    assert {name: budget["target"] / budget["dense"] for name, budget in targets.items()} == {
        "budget.sparsity=0.25": 0.75,
        "budget.sparsity=0.5": 0.5,
    }


# Killed, and given the same command again

# The process kills itself for real when it is about to write the n-th file of a name: so each moment is hit exactly.
KILLED = """
import os, signal, sys
import supernet.system.atomic

name, count = sys.argv.pop(1), int(sys.argv.pop(1))
write = supernet.system.atomic.write_atomic

def write_or_die(path, data):
    global count
    count -= path.name == name
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)

supernet.system.atomic.write_atomic = write_or_die
import search.__main__
search.__main__.main()
"""
MOMENTS = {  # file, n, and whether the last generation in the history is replaced
    "build, a unit's file written but not yet in the manifest": ("manifest.json", 3, False),
    "build of the second round": ("manifest.json", 13, False),
    "search, a generation's rows written but not yet its checkpoint": ("round-0.json", 2, True),
    "search of the second round, before its rows are written": ("history.parquet", GENERATIONS + 1, False),
    "evaluate": ("metrics.json", 0, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_like_an_undisturbed_one(
    moment: str, finished: Path, tmp_path: Path, empty_cache: Path, call: Call, run_search: Call
) -> None:
    file, count, redone = MOMENTS[moment]
    killed = run_search(tmp_path, file, str(count), SMOKE, python=("-c", KILLED))
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / RUN
    assert not (run / "metrics.json").exists()
    units = {path: path.stat().st_mtime_ns for path in empty_cache.rglob("*.safetensors") if named(path)}
    before = history(run) if (run / "history.parquet").exists() else pd.DataFrame({"seconds": [], "generation": []})
    kept = before.seconds[before.generation < before.generation.max()] if redone else before.seconds

    assert call(SMOKE).returncode == 0
    expected = finished / RUN
    for name in ("allocation.json", "checkpoint/round-1.json", "export/model.safetensors"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert without_times(read(run / "metrics.json")) == without_times(read(expected / "metrics.json"))
    pd.testing.assert_frame_equal(history(run).drop(columns="seconds"), history(expected).drop(columns="seconds"))
    # What was done before is not done again: files are untouched, and rows have the seconds of the first time.
    assert {path: path.stat().st_mtime_ns for path in units} == units
    assert history(run).seconds[: len(kept)].tolist() == kept.tolist()


def named(path: Path) -> bool:
    """Whether a file of candidates is in its supernet's manifest."""
    manifest = path.parents[1] / "manifest.json"
    return manifest.exists() and path.stem in read(manifest)["units"]


@pytest.mark.sampled(0)
@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_who_is_stopped_says_how_to_go_on(
    number: signal.Signals, word: str, status: int, tmp_path: Path, start_search: Callable[..., Popen[str]]
) -> None:
    with start_search(tmp_path, SMOKE, "strategy.generations=100000") as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / RUN / "checkpoint/round-0.json").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status
    assert errors == f"{word}; the same command continues from the last completed step\n"
    assert read(tmp_path / RUN / "checkpoint/round-0.json")["state"]["generation"] >= 1
