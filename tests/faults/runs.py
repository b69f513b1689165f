"""Whole runs of a tiny model in which something goes wrong at a chosen moment, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

ARGUMENTS = (
    "+experiment=smoke",
    "model.num_hidden_layers=2",
    "rounds=1",
    "strategy.generations=2",
    "strategy.offspring=2",
    "data.sequence_length=32",
    "data.sequences={calibration: 4, search: 8, evaluation: 4}",
    "export.check=false",
    "supernet.root=net",
    "hydra.run.dir=run",
)
# A process that has imported everything forks a child for each run: importing takes seconds, a run not much more than
# one. The child counts the calls that make a change last, and dies before or behind one of them, or finds the disk full
# from one on.
SERVER = """
import errno, json, os, shutil, signal, sys
import search.cli.command, search.run.pipeline, search.export.huggingface
from search.__main__ import main

LASTING = [(os, "replace"), (os, "fsync"), (os, "rename"), (shutil, "rmtree")]

def watch(fault):
    kind, at = fault or ("none", -1)
    count = 0
    def watched(call):
        def replaced(*arguments, **named):
            nonlocal count
            here, count = count, count + 1
            if kind == "kill" and at == 2 * here:
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "full" and here >= at and call.__name__ == "fsync":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = call(*arguments, **named)
            if kind == "kill" and at == 2 * here + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return replaced
    for module, name in LASTING:
        setattr(module, name, watched(getattr(module, name)))
    return lambda: count

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(job["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job["said"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv[1:] = job["arguments"]
        counted, status = watch(job["fault"]), 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        with open(job["said"] + ".count", "w") as file:
            file.write(str(counted()))
        try:
            sys.stdout.flush()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (below 0: by a signal), what it said, and how many lasting changes it made."""

    status: int
    stdout: str
    stderr: str
    count: int


class Runs:
    """Starts runs, one after the other."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._number = scratch, 0
        root = str(Path(__file__).resolve().parents[2])
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )

    def __call__(
        self,
        folder: Path,
        fault: tuple[str, int] | None = None,
        arguments: Sequence[str] = (),
        status: int | None = None,
    ) -> Ended:
        """A run of `ARGUMENTS` and these, in a folder; where a status is given, it must end so."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._number += 1
        said = self._scratch / str(self._number)
        job = {"folder": str(folder), "said": str(said), "arguments": [*ARGUMENTS, *arguments], "fault": fault}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        found = int(self._server.stdout.readline())
        texts = [said.with_name(f"{said.name}.{name}").read_text() for name in ("stdout", "stderr")]
        count = said.with_name(f"{said.name}.count")
        ended = Ended(found, *texts, int(count.read_text()) if count.exists() else -1)
        assert status is None or ended.status == status, ended
        return ended

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


def result(folder: Path) -> dict[str, Any]:
    """All that a run must leave alike whatever befell it: without times, and what follows from them."""
    run = folder / "run"
    found: dict[str, Any] = {"allocation": (run / "allocation.json").read_bytes()}
    metrics = json.loads((run / "metrics.json").read_text())
    found["metrics"] = {key: value for key, value in metrics.items() if key not in ("stages", "checksum")}
    history = pd.read_parquet(run / "history.parquet").drop(columns="seconds")
    found["history"] = history.to_dict("records")
    for file in sorted((run / "export").iterdir()):
        found[file.name] = file.read_bytes()
    return found


def left_over(folder: Path) -> list[str]:
    """Temporary files that nothing will sweep away."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".draft"))]
