"""A run's directory: what it has done so far, so that the same command goes on from there and another one is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from search.costs import CostTable
from search.errors import reason
from search.strategies.base import Row, State
from supernet.atomic import write_atomic
from supernet.errors import InputError
from supernet.memory import peak, restart_peak
from supernet.space import Space
from supernet.uses import note_use

SETTINGS = "checkpoint/settings.json"
IDENTITY = "checkpoint/identity.json"
COSTS = "checkpoint/costs.json"
SUPERNETS = "checkpoint/supernets.json"
LATENCY = "checkpoint/latency-{}.json"
HISTORY = "history.parquet"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a run's directory; InputError where one is at work. The kernel frees a dead one's lock."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"{path} is in use by another process; wait for it, or choose another hydra.run.dir") from error


class RunDirectory:
    """Files of one run. Every write is atomic."""

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool) -> None:
        """Open the directory for a run with these settings.

        Args:
            path: The directory; made if it is not there.
            settings: JSON-able; all that the result depends on.
            fresh: Move what is there aside first.

        Raises:
            InputError: The directory holds a run with other settings; the message lists them.
        """
        self.path = path
        self.identity: Any = None
        self.settings = json.loads(json.dumps(settings))
        self._supernets: dict[str, str] | None = None
        if fresh and (path / SETTINGS).exists():
            _move_aside(path)
        before = self.read(SETTINGS)
        if before is not None and before != self.settings:
            changes = ", ".join(_changes(before, self.settings))
            raise InputError(
                f"{path} holds a run with other settings ({changes}); "
                "set them back to continue it, choose another hydra.run.dir, or move it aside with fresh=true"
            )

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say what model and text the run works on; InputError where the run in the directory worked on others."""
        self.identity = json.loads(json.dumps(identity))
        before = self.read(IDENTITY)
        if before is not None and before != self.identity:
            changes = ", ".join(_changes(before, self.identity))
            raise InputError(f"{self.path} holds a run on another model or text ({changes}); start over with fresh=true")

    def read(self, name: str) -> Any:
        """The content of a JSON file, or None where it is not there."""
        return _read(self.path / name)

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        write_atomic(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def latencies(self, space: Space) -> CostTable | None:
        """What the units of a space took when the run measured them: its limit must not move when it is resumed."""
        file = self.path / LATENCY.format(space.fingerprint)
        content = _read(file) if self._claimed else None  # of a directory that is not claimed it may be of other settings
        if content is None:
            return None
        try:
            return CostTable(tuple(tuple(int(cost) for cost in row) for row in content["costs"]), int(content["rest"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, error) from error

    def keep_latencies(self, space: Space, table: CostTable) -> None:
        """Keep them for that."""
        self.write(LATENCY.format(space.fingerprint), asdict(table))

    def note_supernet(self, fingerprint: str, path: Path) -> Path:
        """Add to the supernets that the run uses; the file that lists them, for `Supernet.note_use`.

        The list of a directory that is not claimed yet may be of other settings: it starts anew.
        """
        if self._supernets is None:
            self._supernets = dict(self.read(SUPERNETS) or {}) if self._claimed else {}
        self._supernets[fingerprint] = str(path.resolve())
        self.write(SUPERNETS, self._supernets)
        return self.path / SUPERNETS

    def load_state(self, round_index: int, space: Space) -> State | None:
        """Where the search of a round stands; InputError where it was a search of another space."""
        content = self.read(f"checkpoint/round-{round_index}.json")
        if content is None:
            return None
        file = self.path / f"checkpoint/round-{round_index}.json"
        try:
            searched = content.pop("space")
            state = State(**(content | {"parent": tuple(content["parent"])}))
        except (AttributeError, KeyError, TypeError) as error:
            raise _damaged(file, error) from error
        if searched != space.fingerprint:
            raise InputError(f"{file} is of a search among other levels; start over with fresh=true")
        return state

    def save_state(self, round_index: int, space: Space, state: State, rows: list[Row]) -> None:
        """Add a generation's rows to the history, then move the checkpoint on.

        In this order, so that a kill in between leaves rows of a generation that is done again: they are replaced then.
        """
        self._claim()
        if rows:  # none where the space was exhausted: that is no generation of its own
            history = self.history()
            done_again = (history["iteration"] == round_index) & (history["generation"] >= state.generation - 1)
            table = pd.concat([history[~done_again], _table(round_index, rows)], ignore_index=True)
            write_atomic(self.path / HISTORY, table.to_parquet(index=False))
        self.write(f"checkpoint/round-{round_index}.json", asdict(state) | {"space": space.fingerprint})

    def history(self) -> pd.DataFrame:
        """All rows so far."""
        file = self.path / HISTORY
        try:
            return pd.read_parquet(file) if file.exists() else _table(0, [])
        except ValueError as error:  # what pyarrow raises for a file that is not Parquet
            raise _damaged(file, error) from error

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of a stage to those of earlier runs of it, and note the most memory that was held in it.

        `peak_memory_of` is `process` where the system cannot tell the stage's peak (macOS): then it is the process's so far.
        """
        of_stage = restart_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        before = self.costs().get(name, {})
        cost = {"seconds": round(before.get("seconds", 0.0) + time.perf_counter() - start, 2), "peak_memory_bytes": peak()}
        if torch.cuda.is_available():
            cost["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
        largest = {key: max(value, before.get(key, 0)) for key, value in cost.items()}
        self._claim()
        self.write(COSTS, self.costs() | {name: largest | {"peak_memory_of": "stage" if of_stage else "process"}})

    def costs(self) -> dict[str, Any]:
        """For each stage its seconds, and the most memory that was held in it."""
        return dict(self.read(COSTS) or {})

    @property
    def _claimed(self) -> bool:
        return (self.path / SETTINGS).exists()

    def _claim(self) -> None:
        """Note whose run this is. Not before there is something to lose: a mistaken setting must be free to be corrected."""
        if not self._claimed:
            self.write(IDENTITY, self.identity)
            self.write(SETTINGS, self.settings)


def _read(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is damaged ({reason(error)}); delete it, or start over with fresh=true")


def _table(round_index: int, rows: list[Row]) -> pd.DataFrame:
    columns = {
        "iteration": pd.Series([round_index] * len(rows), dtype="int32"),
        "generation": pd.Series([row.generation for row in rows], dtype="int32"),
        "step": pd.Series([row.step for row in rows], dtype="int32"),
        "tokens": pd.Series([row.tokens for row in rows], dtype="int64"),
        "fitness": pd.Series([row.fitness for row in rows], dtype="float64"),
        "survived": pd.Series([row.survived for row in rows], dtype="bool"),
        "seconds": pd.Series([row.seconds for row in rows], dtype="float64"),
        "allocation": pd.Series([" ".join(map(str, row.allocation)) for row in rows], dtype="str"),
    }
    return pd.DataFrame(columns)


def _move_aside(path: Path) -> None:
    """Move a run's files to the first free `<path>.old-<n>`, from where they refer to their supernets again.

    Hydra's own files of this job stay: they are being written.
    """
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    target.mkdir(parents=True)
    # The checkpoint last: it makes a run.
    for name in (HISTORY, "allocation.json", "front.json", "metrics.json", "export", "checkpoint"):
        if (path / name).exists():
            (path / name).rename(target / name)
    listed = target / SUPERNETS
    for fingerprint, supernet in dict(_read(listed) or {}).items():
        if Path(supernet).is_dir():
            note_use(Path(supernet), fingerprint, listed)


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Paths of the values that differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        kinds = before.get("_target_"), after.get("_target_")
        if kinds[0] != kinds[1]:  # then all its settings differ, too
            return ["{}: {} there, {} now".format(prefix, *kinds)]
        keys = dict.fromkeys([*before, *after])
        return [line for key in keys for line in _changes(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)]
    return [] if before == after else [f"{prefix}: {json.dumps(before)} there, {json.dumps(after)} now"]
