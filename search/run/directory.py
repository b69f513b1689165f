"""A run's directory: what it has done so far, so that the same command goes on from there and another one is
refused.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xxhash
from filelock import FileLock, Timeout

from search.budgets.costs import CostTable
from search.errors import reason
from search.run.aside import CHECKPOINT, finish_moving, move_aside
from search.strategies.base import HistoryRow
from search.strategies.state import State, read_count
from supernet.errors import InputError
from supernet.space import Space
from supernet.system.atomic import make_folder, sweep, write_atomic
from supernet.system.memory import peak, restart_peak
from supernet.system.records import WRONG, UnreadableError, read_record, write_record

SETTINGS = "checkpoint/settings.json"
IDENTITY = "checkpoint/identity.json"
COSTS = "checkpoint/costs.json"
SUPERNETS = "checkpoint/supernets.json"
LATENCY = "checkpoint/latency-{}.json"
ROUND = "checkpoint/round-{}.json"
ROUND_FORMAT = 2
FRESH = "checkpoint/fresh.json"  # of a run that fresh=true began, until it is finished
IDENTIFIER = "checkpoint/identifier.json"
HISTORY = "history.parquet"
COLUMNS = {
    "iteration": "int32",
    "generation": "int32",
    "step": "int32",
    "tokens": "int64",
    "fitness": "float64",
    "survived": "bool",
    "seconds": "float64",
    "allocation": "str",
}

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, results: Sequence[str] = ()) -> Iterator[None]:
    """Keep other processes out of a run's directory, and first finish or sweep away what a killed process left half
    done.

    InputError where another process is at work there. The kernel frees the lock of a process that died.
    """
    make_folder(path)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{path} is in use by another process; wait for it, or choose another hydra.run.dir"
        ) from error
    except OSError as error:
        raise InputError(f"cannot lock {path / '.lock'}: {error.strerror}; choose another hydra.run.dir") from error
    try:
        finish_moving(path, (HISTORY, *results))
        for folder in (path, path / CHECKPOINT):
            sweep(folder)
        yield
    finally:
        lock.release()


class RunDirectory:
    """The files of one run, each written atomically."""

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool, results: Sequence[str] = ()) -> None:
        """Open the directory for a run with these settings.

        Args:
            path: The directory; made if it is not there.
            settings: JSON-able; all that the result depends on.
            fresh: Move what is there aside first.
            results: Names of what stages leave in the directory, which moves with the checkpoint.

        Raises:
            InputError: The directory holds a run with other settings; the message lists them.
        """
        self.path = path
        self.identity: Any = {}
        self.settings = json.loads(json.dumps(settings))
        self._fresh, self._results = fresh, (HISTORY, *results)
        self._supernets: dict[str, str] | None = None
        if fresh and self._holds_a_run and not self._goes_on():
            move_aside(path, self._results)
        before = self.read(SETTINGS)
        if before is None and self._holds_a_run:
            raise _missing(path / SETTINGS)
        if before is not None and before != self.settings:
            changes = ", ".join(_changes(before, self.settings))
            raise InputError(
                f"{path} holds a run with other settings ({changes}); set them back to continue it, choose another "
                "hydra.run.dir, or move it aside with fresh=true"
            )

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say what model and text the run works on; InputError where the run in the directory worked on others."""
        self.identity = json.loads(json.dumps(identity))
        if not self._claimed:
            return
        before = self.read(IDENTITY)
        if before is None:
            raise _missing(self.path / IDENTITY)
        if before == self.identity:
            return
        if not self._fresh:
            changes = ", ".join(_changes(before, self.identity))
            raise InputError(
                f"{self.path} holds a run on another model or text ({changes}); start over with fresh=true"
            )
        move_aside(self.path, self._results)

    def identifier(self) -> str:
        """Return what tells this run from others of the same name. It is made when first asked for, and moved aside
        with the run.
        """
        record = self.read(IDENTIFIER)
        if record is None:
            self.write(IDENTIFIER, record := {"run": uuid.uuid4().hex})
        return str(record["run"])

    @property
    def _holds_a_run(self) -> bool:
        """Whether the directory holds a run that could be lost."""
        names = (SETTINGS, COSTS, HISTORY)
        return any((self.path / name).exists() for name in names) or any(self.path.glob(ROUND.format("*")))

    def _goes_on(self) -> bool:
        """Whether this same command, with fresh=true, began the run here and was killed: then it goes on instead of
        starting over.
        """
        try:
            if self.read(FRESH) is None or self.read(SETTINGS) != self.settings:
                return False
            for file in (self.path / CHECKPOINT).glob("*.json"):
                self.read(f"{CHECKPOINT}/{file.name}")
            self.history()
        except InputError:  # damaged: this is how to get rid of it
            return False
        log.info("the run that fresh=true began here goes on; to start over again, delete %s first", self.path / FRESH)
        return True

    def finish(self) -> None:
        """Note that all stages are done, so that fresh=true starts over from now on."""
        with suppress(OSError):
            (self.path / FRESH).unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file, None where there is none; InputError where it is not what was written."""
        file = self.path / name
        try:
            return read_record(file)
        except UnreadableError as error:
            raise _damaged(file, str(error)) from error

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an object to a JSON file, with its checksum."""
        write_record(self.path / name, content)

    def latencies(self, space: Space) -> CostTable | None:
        """Return the latencies that this run measured for a space; None where it measured none.

        They are kept with the run because its limit must not move when it is resumed.
        """
        name = LATENCY.format(space.fingerprint)
        # of a directory that is not claimed it may be of other settings
        content = self.read(name) if self._claimed else None
        if content is None:
            if self._claimed and any(
                space.fingerprint == (self._round(file) or {}).get("space") for file in self._rounds
            ):
                raise _missing(self.path / name)
            return None
        try:
            table = CostTable(
                tuple(tuple(map(read_count, row)) for row in content["costs"]), read_count(content["rest"])
            )
            if [len(row) for row in table.costs] != [len(unit.levels) for unit in space.units]:
                raise ValueError("it is not of these levels")
        except WRONG as error:
            raise _damaged(self.path / name, reason(error)) from error
        return table

    @property
    def _rounds(self) -> list[Path]:
        return sorted(self.path.glob(ROUND.format("*")))

    def _round(self, file: Path) -> dict[str, Any] | None:
        return self.read(f"{CHECKPOINT}/{file.name}")

    def keep_latencies(self, space: Space, table: CostTable) -> None:
        """Write the latencies of a space, for `latencies` to return."""
        self.write(LATENCY.format(space.fingerprint), asdict(table))

    def note_supernet(self, fingerprint: str, path: Path) -> Path:
        """Note that the run uses a supernet, and return the file that lists all it uses, for `Supernet.note_use`.

        The list of a directory that is not claimed yet may be of other settings: it starts anew.
        """
        self._supernets = {**self._listed(), fingerprint: str(path.resolve())}
        self.write(SUPERNETS, self._supernets)
        return self.path / SUPERNETS

    def uses(self, fingerprint: str) -> bool:
        """Whether the run noted that it uses the supernet of this fingerprint."""
        return fingerprint in self._listed()

    def _listed(self) -> dict[str, str]:
        if self._supernets is None:
            self._supernets = dict(self.read(SUPERNETS) or {}) if self._claimed else {}
        return self._supernets

    def load_state(
        self, round_index: int, space: Space, generations: int, state_class: type[State] = State
    ) -> State | None:
        """Return where the search of a round stands; None where it did not begin.

        Args:
            round_index: Of the round.
            space: That it searches; InputError where it was a search of another one.
            generations: The most that it has.
            state_class: `Strategy.state_class`.

        Raises:
            InputError: What is there is not what a search wrote.
        """
        name = ROUND.format(round_index)
        file, content = self.path / name, self.read(name)
        if content is None:
            self._check_not_begun(round_index)
            return None
        try:
            version = content.get("format", 1)
            if version != ROUND_FORMAT:
                raise InputError(f"{file} has format {version}, not {ROUND_FORMAT}; start over with fresh=true")
            searched, rows, checksum = content["space"], read_count(content["rows"]), content["history"]
            if searched != space.fingerprint:
                raise InputError(f"{file} is of a search among other levels; start over with fresh=true")
            state = state_class.from_json(content["state"])
            state.check_levels(space)
            if state.generation > generations:
                raise ValueError(f"it is of generation {state.generation} of {generations}")
        except WRONG as error:
            raise _damaged(file, reason(error)) from error
        history = self.history()
        if len(history) < rows or _checksum(history[:rows]) != checksum:
            lost = "is missing" if not (self.path / HISTORY).exists() else "has not the rows that the run wrote"
            raise InputError(f"{self.path / HISTORY} {lost}; start over with fresh=true")
        return state

    def _check_not_begun(self, round_index: int) -> None:
        """InputError where a round has no checkpoint although its history goes beyond the first generation."""
        history = self.history()
        later = history["iteration"] > round_index
        further = (history["iteration"] == round_index) & (history["generation"] > 0)
        if (later | further).any() or len(self._rounds) > round_index:
            raise _missing(self.path / ROUND.format(round_index))

    def save_state(self, round_index: int, space: Space, state: State, rows: list[HistoryRow]) -> None:
        """Add a generation's rows to the history, then write the checkpoint, which knows how many rows it stands for.

        In this order, so that a kill in between leaves rows of a generation that is done again: they are replaced then.
        """
        self._claim()
        table = self.history()
        if rows:  # none where the space was exhausted: that is no generation of its own
            done_again = (table["iteration"] == round_index) & (table["generation"] >= state.generation - 1)
            table = pd.concat([table[~done_again], _table(round_index, rows)], ignore_index=True)
            write_atomic(self.path / HISTORY, table.to_parquet(index=False))
        noted = {"space": space.fingerprint, "rows": len(table), "history": _checksum(table)}
        self.write(ROUND.format(round_index), {"format": ROUND_FORMAT, "state": state.to_json()} | noted)

    def history(self) -> pd.DataFrame:
        """Return all rows so far."""
        file = self.path / HISTORY
        if not file.exists():
            return _table(0, [])
        try:
            table = pd.read_parquet(file, use_threads=False)  # a thread that cannot start would look like damage
            _checksum(table)
        except Exception as error:  # pyarrow and pandas have no common kind for what damage may lead to
            raise _damaged(file, reason(error)) from error
        return table

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage: its seconds are added to those of earlier runs, and the most memory that it held is kept.

        `peak_memory_of` is `process` where the system cannot tell the stage's peak (macOS): then it is the process's so
        far.
        """
        of_stage = restart_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        before = self.costs().get(name, {})
        cost = {
            "seconds": round(before.get("seconds", 0.0) + time.perf_counter() - start, 2),
            "peak_memory_bytes": peak(),
        }
        if torch.cuda.is_available():
            cost["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
        largest = {key: max(value, before.get(key, 0)) for key, value in cost.items()}
        self._claim()
        self.write(COSTS, self.costs() | {name: largest | {"peak_memory_of": "stage" if of_stage else "process"}})

    def costs(self) -> dict[str, Any]:
        """Return for each stage its seconds, and the most memory that it held."""
        found = self.read(COSTS) or {}
        for cost in found.values():
            numbers = [cost.get(key) for key in ("seconds", "peak_memory_bytes")] if isinstance(cost, dict) else [None]
            if any(type(number) not in (int, float) for number in numbers):
                raise _damaged(self.path / COSTS, "its costs are no numbers")
        return found

    @property
    def _claimed(self) -> bool:
        return (self.path / SETTINGS).exists()

    def _claim(self) -> None:
        """Note whose run this is, once there is something to lose: until then a mistaken setting may be corrected."""
        if not self._claimed:
            if self._fresh:
                self.write(FRESH, {})
            self.write(IDENTITY, self.identity)
            self.write(SETTINGS, self.settings)


def _damaged(file: Path, why: str) -> InputError:
    # Without these nothing is lost but times, or what trackers know the run by: all else decides what is found.
    free = file.parent.name != CHECKPOINT or file.name in ("costs.json", "supernets.json", "identifier.json")
    advice = (
        "delete it, and the same command writes a new one"
        if free and file.name != HISTORY
        else "start over with fresh=true"
    )
    return InputError(f"{file} is damaged ({why}); {advice}")


def _missing(file: Path) -> InputError:
    return InputError(f"{file} is missing, without which the run there cannot go on; start over with fresh=true")


def _checksum(table: pd.DataFrame) -> str:
    """Return a hash of the rows without their seconds, which no two runs share; raise where the table is no history."""
    if list(table.columns) != list(COLUMNS):
        raise ValueError("its columns are not those of a history")
    hashed = xxhash.xxh3_128()
    for name, kind in COLUMNS.items():
        if kind == "str":
            hashed.update("\n".join(table[name]).encode())
        elif table[name].dtype != kind:
            raise TypeError(f"its column {name} is no {kind}")
        elif name != "seconds":
            hashed.update(table[name].to_numpy().tobytes())
    return hashed.hexdigest()


def _table(round_index: int, rows: list[HistoryRow]) -> pd.DataFrame:
    values = {name: [getattr(row, name, round_index) for row in rows] for name in COLUMNS}
    values["allocation"] = [" ".join(map(str, row.allocation)) for row in rows]
    return pd.DataFrame({name: pd.Series(values[name], dtype=kind) for name, kind in COLUMNS.items()})


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of the values that differ, each with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        kinds = before.get("_target_"), after.get("_target_")
        if kinds[0] != kinds[1]:  # then all its settings differ, too
            return ["{}: {} there, {} now".format(prefix, *kinds)]
        keys = dict.fromkeys([*before, *after])
        return [
            line
            for key in keys
            for line in _changes(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == after else [f"{prefix}: {json.dumps(before)} there, {json.dumps(after)} now"]
