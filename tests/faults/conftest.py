"""One undisturbed run, and what starts others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    started = Runs(tmp_path_factory.mktemp("said"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a run that nothing befell, and how many lasting changes it made. Not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, runs(folder, status=0).count
