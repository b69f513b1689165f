"""Spaces to search that have nothing to do with a model, the command line within this process, and a finished run."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from transformers import PreTrainedModel

from search.__main__ import main
from search.export.check import Checked
from search.paths import CACHE_VARIABLE
from supernet.space import Level, Space, Unit


def make_space(*units: tuple[int, tuple[int, ...]]) -> Space:
    """Units of alternating kinds from (parameters of a member, members kept at each level)."""
    return Space(
        tuple(
            Unit(f"unit.{index}", ("attention", "mlp")[index % 2], kept[0], tuple(Level(k, k * each) for k in kept))
            for index, (each, kept) in enumerate(units)
        )
    )


def make_random_space(seed: int, units: int = 4, levels: int = 4) -> Space:
    """Units of very different sizes with up to `levels` levels, some of them without a choice."""
    rng = np.random.default_rng(seed)
    described = []
    for _ in range(units):
        total = int(rng.integers(levels, 12))
        sparser = rng.choice(total, size=int(rng.integers(0, levels)), replace=False)
        described.append((int(rng.integers(1, 9)), (total, *sorted((int(k) for k in sparser), reverse=True))))
    return make_space(*described)


@pytest.fixture(scope="session")
def space_of() -> Callable[..., Space]:
    return make_space


@pytest.fixture(scope="session")
def random_space() -> Callable[..., Space]:
    return make_random_space


@pytest.fixture(scope="module")
def llama(model_of: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A small random model that the tests of a file share. Not to be changed."""
    return model_of("llama")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Runs the command line within this process, in `tmp_path`: seconds quicker than a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # so that what `main` sets is put back
    # The fresh process that checks an export takes seconds; `finished` and the tests of the export have it.
    monkeypatch.setattr("search.export.huggingface.check_folder", lambda *_: Checked(4, 1.0, 1.0, 0.0, 0.0))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["search", *arguments])
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return CompletedProcess(arguments, status, *capsys.readouterr())

    yield run
    root.handlers, root.level = handlers, level


@pytest.fixture(scope="session")
def refusal() -> Callable[[CompletedProcess[str]], str]:
    """Takes a process that must have refused, and gives the one line that it said."""

    def line_of(process: CompletedProcess[str]) -> str:
        assert process.returncode == 1, process.stdout + process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
        return process.stderr.strip()

    return line_of


@pytest.fixture(scope="session")
def finished(shared: Path, run_search: Callable[..., CompletedProcess[str]]) -> Path:
    """A folder in which a fresh process ran the smoke experiment, its cache within. Not to be changed."""
    folder, done = shared / "finished", shared / "finished.done"
    with FileLock(shared / "finished.lock"), pytest.MonkeyPatch.context() as patch:
        if not done.exists():  # else another process of the session was here before
            folder.mkdir(exist_ok=True)
            patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
            # As the tests have it: the order of sums, and so their last bits, depends on it.
            patch.setenv("OMP_NUM_THREADS", "1")
            process = run_search(folder, "+experiment=smoke", "evaluate.prompt=to be")
            assert (process.returncode, process.stderr) == (0, "")
            for row in ("dense", "uniform", "searched", "Look at the KL", "How each goes on", "For your own model"):
                assert row in process.stdout
            done.touch()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` to work in: `tmp_path`, where `call` runs."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path
