"""What is built and searched: nothing that is not used."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pytest

from search.paths import CACHE_VARIABLE
from search.strategies.base import Strategy
from search.strategies.evolution.random import Random
from search.strategies.guided.search import Guided
from search.strategies.rules.uniform import Uniform
from tests.search.synthetic import TRANSFORMER, SpaceOf, make_problem, run

Call = Callable[..., CompletedProcess[str]]
SMALL = ("+experiment=smoke", "strategy.generations=2", "data.sequences.calibration=4", "data.sequences.search=8")
RULE = (
    "+experiment=smoke",
    "data.sequences.calibration=4",
    "data.sequences.search=8",
    "stages=[build,search,evaluate]",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def supernets(cache: Path) -> int:
    return len(list(cache.glob("supernets/*/manifest.json")))


@pytest.mark.parametrize(
    ("strategy", "built"),
    [("uniform", 1), ("owl", 2)],  # that of the uniform allocation, and the rule's own
)
def test_a_rule_builds_its_last_rebuilds_alone(strategy: str, built: int, call: Call, cache: Path) -> None:
    process = call(*RULE, f"strategy={strategy}", "rounds=2")
    assert (process.returncode, process.stderr) == (0, "")
    assert "rounds: one, as this strategy looks at no candidates" in process.stdout
    assert supernets(cache) == built


def test_a_rule_that_looks_at_candidates_has_them(call: Call, cache: Path) -> None:
    process = call(*RULE, "strategy=bonsai", "strategy.samples=8", "rounds=2", "stages=[build,search]")
    assert (process.returncode, process.stderr) == (0, "")
    assert supernets(cache) == 2


def test_a_build_for_a_rule_has_nothing_to_do(call: Call, cache: Path) -> None:
    process = call(*RULE, "strategy=uniform", "stages=[build]")
    assert (process.returncode, process.stderr) == (0, "")
    assert "build: nothing is left to do" in process.stdout
    assert supernets(cache) == 0


@pytest.mark.parametrize(
    ("prune", "rounds"),
    [
        (["prune=depth"], 1),
        (["prune=wanda", "prune.pruner.pattern=2:4"], 1),
        (["prune=rtn", "budget=bits", "budget.bits=6", "dtype=float32"], 1),
        # built anew along what was found
        (["prune=sparsegpt", "prune.pruner.pattern=2:4", "prune.accumulation=chosen"], 2),
        (["prune=magnitude"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_fixed_levels_have_one_round(prune: list[str], rounds: int, call: Call, tmp_path: Path) -> None:
    process = call(*SMALL, "rounds=2", "stages=[build,search]", *prune)
    assert (process.returncode, process.stderr) == (0, "")
    history = pd.read_parquet(tmp_path / "outputs/search/smoke/history.parquet")
    assert set(history["iteration"]) == set(range(rounds))
    assert ("rounds: one, as the levels of this kind of pruning are fixed" in process.stdout) == (rounds == 1)


@pytest.mark.parametrize(
    ("strategy", "sequences", "told"),
    [
        (Guided(), 2, "none will be taken: use data.sequences.search=4 or more, and strategy.tokens=4096"),
        (
            Guided(tokens=64, growth=1),
            16,
            "none will be taken: use data.sequences.search=16 or more, and strategy.tokens=128",
        ),
        (Guided(), 3, "data.sequences.search=3: differences on so few are mostly chance; take at least 4"),
        (Random(generations=1, offspring=2, tokens=[64], survivors=[1]), 1, "data.sequences.search=1: differences"),
        (Guided(), 4, ""),
        (Uniform(), 1, ""),
    ],
)
def test_a_search_on_too_few_sequences_is_told(strategy: Strategy, sequences: int, told: str) -> None:
    warning = strategy.pool_warning(sequences, 64) or ""
    assert told in warning
    assert bool(told) == bool(warning)


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_where_it_is_told_that_none_will_be_taken_none_is(space_of: SpaceOf, sequences: int) -> None:
    problem = make_problem(space_of(*TRANSFORMER), sequences=sequences)
    states, _ = run(Guided(generations=3, tokens=64), problem)
    assert (states[-1].parent == problem.start) == (sequences < 3)
