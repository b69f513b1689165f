"""A model larger than memory, searched (Linux, as root: it makes a control group).

    python -m tests.benchmarks.streaming

A random Llama is written as an ordinary folder, and the command line works on it in a control group whose memory, page
cache included and without swap, is smaller than the model. Prints each run's time and its peak of memory that is not
backed by a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from search.inputs.models import random_llama

VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
SETTINGS = (
    "prune=magnitude",
    "supernet.levels=3",
    "supernet.step=0.25",
    "supernet.lowest=0.25",
    "budget.sparsity=0.5",
    "data.sequence_length=128",
    "data.sequences={calibration: 2, search: 8, evaluation: 2}",
    "rounds=1",
    "strategy.generations=2",
    "strategy.offspring=8",
    "strategy.proposal_tokens=256",
    "strategy.tokens=512",
    "strategy.growth=1",
)


def write_model(folder: Path, blocks: int) -> int:
    """A Llama of random weights in bfloat16, 135 MB a block; returns the bytes of its weights."""
    small = random_llama(0, 64, 64, 1, 1, 1, dtype=torch.bfloat16)  # for its tokenizer
    config = LlamaConfig(
        vocab_size=len(small.tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        initializer_range=2048**-0.5,
        bos_token_id=None,
        eos_token_id=small.tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config)
    model.save_pretrained(folder)
    small.tokenizer.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


class Group:
    """A control group with a limit on its memory."""

    def __init__(self, limit: int) -> None:
        self.old = (VERSION_1 / "memory.limit_in_bytes").exists()
        self.path = (VERSION_1 if self.old else VERSION_2) / f"sparsity-search-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self.old else "memory.max")).write_text(str(limit))

    def run(self, command: list[str], folder: Path) -> tuple[int, float, int, str]:
        """Exit status, seconds, peak bytes of anonymous memory, and the last line of a command run in the group."""
        begun, peak = time.perf_counter(), 0
        enter = ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *command]
        with open(folder / "log", "w") as log, subprocess.Popen(enter, cwd=folder, stdout=log, stderr=log) as process:
            while process.poll() is None:
                stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
                peak = max(peak, int(stat["total_rss" if self.old else "anon"]))
                time.sleep(0.05)
        lines = (folder / "log").read_text().strip().splitlines() or [""]
        return process.returncode, time.perf_counter() - begun, peak, lines[-1]

    def remove(self) -> None:
        """The group, which must be empty."""
        self.path.rmdir()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--limit", type=int, default=1_600_000_000, help="bytes of memory")
    given = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder / "model", given.blocks)
        print(f"model: {size / 1e9:.2f} GB; memory: {given.limit / 1e9:.2f} GB", flush=True)
        group = Group(given.limit)
        common = ["env", f"PYTHONPATH={root}", f"SPARSITY_SEARCH_CACHE={folder}/cache", sys.executable, "-m", "search"]
        runs = {
            "build": ["stages=[build]", "evaluator.resident=blocks"],
            "search, resident=blocks": ["stages=[search]", "evaluator.resident=blocks"],
            "search, resident=model, states and candidates as found": ["stages=[search]", "fresh=true"],
        }
        try:
            for title, extra in runs.items():
                command = [*common, f"model={folder}/model", *SETTINGS, *extra, f"hydra.run.dir={folder}/run"]
                status, seconds, peak, last = group.run(command, folder)
                allocation = folder / "run/allocation.json"
                found = json.loads(allocation.read_text())["budget"] if allocation.exists() else last
                print(f"{title}: exit status {status}, {seconds:.0f} s, peak {peak / 1e9:.2f} GB; {found}", flush=True)
        finally:
            group.remove()
            shutil.rmtree(folder / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
