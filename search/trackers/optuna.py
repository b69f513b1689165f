"""A run's trials in an Optuna study, for people who look at them with optuna-dashboard: a copy of `history.parquet`.

Trial n is row n of the history: what a killed run did not add is added by the next one, and a run that had no study
before can be given one afterwards. With many units take a journal file: a trial of 210 units takes Optuna about 10 ms
there, 200 in SQLite.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError, OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from search.errors import reason
from search.trackers.journal import is_readable, mend, set_aside
from supernet.errors import InputError
from supernet.space import Space

log = logging.getLogger(__name__)

RUN = "run"  # in the study: whose it is
SETTING = "tracker.optuna.study"
FORMS = "a journal file such as trials.log, or a database such as sqlite:///trials.db"
# Of storages that worked before; KeyError where somebody deleted the study.
FAILURES = (OptunaError, SQLAlchemyError, OSError, JSONDecodeError, KeyError)
# And of those that cannot be opened: no driver, tables of another version, a file that is no journal.
MISTAKES = (*FAILURES, ImportError, RuntimeError, ValueError, TypeError, AttributeError)


class OptunaTracker:
    """An Optuna study with a trial for each row of a run's history."""

    def __init__(self, study: str = "trials.log") -> None:
        """Check the setting; the study is opened by `begin`.

        Args:
            study: A journal file, or a database's URL; files are relative to the run's directory.

        Raises:
            InputError: It is no text.
        """
        if type(study) is not str or not study:
            raise InputError(f"{SETTING}={study} must be {FORMS}")
        self._setting = study
        self._shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", study)  # without a password
        self._spaces: dict[int, Space] = {}
        self._is_journal = "://" not in study
        self._alone = not Path(study).expanduser().is_absolute()  # no other run writes into this one's directory

    def begin(self, folder: Path, identifier: str) -> None:
        """Open the study, or make it: called as the directory is, with a number where another run's study is."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study otherwise
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = folder / Path(self._setting).expanduser()
        try:
            self._storage = self._opened(folder)
            self._study = _own(self._storage, folder.resolve().name, identifier)
            self._number = self._storage.get_study_id_from_name(self._study.study_name)
        except MISTAKES as error:
            raise InputError(f"{SETTING}={self._shown} cannot be opened ({reason(error)}); use {FORMS}") from error
        log.info("trials are kept in the study %s of %s", self._study.study_name, self._shown)

    def _opened(self, folder: Path) -> BaseStorage:
        """Open the storage. A journal of the run's own that cannot be read is set aside: the history has all it had."""
        if not self._is_journal:
            return _database(self._setting, folder)
        # else it would become a journal with a misleading name
        if self._journal.suffix in (".db", ".sqlite", ".sqlite3"):
            raise ValueError("without sqlite:/// it would not be a database")
        mend(self._journal, self._alone)
        if self._alone and not is_readable(self._journal):
            aside = set_aside(self._journal)
            log.warning(
                "%s=%s cannot be read: it is %s now, and written anew from the history",
                SETTING,
                self._shown,
                aside.name,
            )
        return JournalStorage(JournalFileBackend(str(self._journal)))

    def generation(self, history: pd.DataFrame, round_index: int, space: Space) -> None:
        """Add the rows that the study does not have yet."""
        self._spaces[round_index] = space
        history = history[history["iteration"] <= round_index]
        try:
            known = bisect_left(range(len(history)), True, key=lambda number: not self._has(number))
            for row in history[known:].to_dict("records"):
                self._study.add_trial(trial(row, self._spaces[int(row["iteration"])]))
        except FAILURES as error:
            log.warning("%s=%s: trials cannot be added now (%s)", SETTING, self._shown, reason(error))
            if self._is_journal:  # a full disk may have cut a line off
                with suppress(OSError, ValueError):
                    mend(self._journal, self._alone)

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Nothing: a study knows no models but its trials."""

    def end(self) -> None:
        """Nothing: each trial was written at once."""

    def _has(self, number: int) -> bool:
        """Whether the study has a trial of this number. Counting its trials would read all of them from a database."""
        try:
            self._storage.get_trial_id_from_study_id_trial_number(self._number, number)
        except KeyError:
            return False
        return True


def trial(row: dict[str, Any], space: Space) -> FrozenTrial:
    """Return a row of the history as a completed trial, with sparsities, because levels differ between rounds."""
    levels = map(int, row["allocation"].split())
    params = {unit.name: unit.sparsity(level) for unit, level in zip(space.units, levels, strict=True)}
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in params}
    attrs = {name: int(row[name]) for name in ("iteration", "generation", "step", "tokens")}
    fitness = float(row["fitness"])
    failed = fitness != fitness
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=None if failed else fitness,
        params=params,
        distributions=distributions,
        user_attrs=attrs | {"survived": bool(row["survived"])},
    )


def _database(study: str, folder: Path) -> BaseStorage:
    url = make_url(study)
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ValueError("it names no file")
        url = url.set(database=str(folder / url.database))
    return RDBStorage(url.render_as_string(hide_password=False))


def _own(storage: BaseStorage, name: str, identity: str) -> optuna.Study:
    """Return the run's study: of its name, or of its name with the first number that no other run's study has."""
    number = 1
    while True:
        tried = name if number == 1 else f"{name}-{number}"
        try:
            study = optuna.create_study(storage=storage, study_name=tried)
            study.set_user_attr(RUN, identity)
            return study
        except DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=tried)
            whose = study.user_attrs.get(RUN)
            # of a run that was killed before it could say so
            if whose is None and not study.get_trials(deepcopy=False):
                study.set_user_attr(RUN, identity)
                whose = identity
            if whose == identity:
                return study
        number += 1
