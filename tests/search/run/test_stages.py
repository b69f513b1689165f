"""What every stage keeps to: it knows whether it is done, does nothing twice, and goes on after a kill."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hydra import compose, initialize_config_dir

from search.paths import conf_dir
from search.run.directory import RunDirectory
from search.run.settings import settings_record
from search.run.shared import Run
from search.run.stages import STAGES, Stage

Call = Callable[..., CompletedProcess[str]]

SMOKE = "+experiment=smoke"
RUN = Path("outputs/search/smoke")


def unsearched(folder: Path) -> None:
    """The run as it was before its first generation."""
    for file in [*(folder / RUN).glob("checkpoint/round-*.json"), folder / RUN / "history.parquet"]:
        file.unlink()
    (folder / RUN / "allocation.json").unlink()


def unbuilt(folder: Path) -> None:
    unsearched(folder)
    shutil.rmtree(folder / "cache/supernets")


# How a stage's result is lost: a new stage needs an entry.
LOST: dict[str, Callable[[Path], None]] = {
    "build": unbuilt,
    "search": unsearched,
    "evaluate": lambda folder: (folder / RUN / "metrics.json").unlink(),
    "export": lambda folder: shutil.rmtree(folder / RUN / "export"),
}


@pytest.fixture
def opened(copy: Path) -> Iterator[Callable[[], Run]]:
    """Opens the finished run of `copy`, as a new process would."""

    def run() -> Run:
        config = compose("search", [SMOKE, "export.check=false"])
        directory = RunDirectory(copy / RUN, settings_record(config), fresh=False)
        found = Run.opened(config, tuple(stage.name for stage in STAGES), directory)
        directory.identify(found.inputs.identity)
        return found

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield run


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but its lock and logs."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and ".hydra" not in file.parts and file.name not in ("search.log", ".lock")
    }


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
class TestContract:
    def test_it_is_done_once_it_has_run(self, stage: Stage, copy: Path, opened: Callable[[], Run]) -> None:
        assert stage.done(opened())
        LOST[stage.name](copy)
        run = opened()
        assert not stage.done(run)
        stage.run(run)
        assert stage.done(run) and stage.done(opened())

    def test_what_it_makes_is_what_it_made(self, stage: Stage, copy: Path, opened: Callable[[], Run]) -> None:
        before = (copy / RUN / "allocation.json").read_bytes(), (copy / RUN / "export/model.safetensors").read_bytes()
        LOST[stage.name](copy)
        for each in STAGES:
            run = opened()
            if not each.done(run):
                each.run(run)
        after = (copy / RUN / "allocation.json").read_bytes(), (copy / RUN / "export/model.safetensors").read_bytes()
        assert after == before

    def test_a_second_run_of_it_does_nothing(self, stage: Stage, copy: Path, call: Call) -> None:
        before = contents(copy / RUN)
        process = call(SMOKE, f"stages=[{stage.name}]")
        assert (process.returncode, process.stderr) == (0, "")
        assert f"{stage.name}: nothing is left to do" in process.stdout
        assert contents(copy / RUN) == before

    @pytest.mark.parametrize("writes", [0, 1, 3])
    def test_a_killed_one_goes_on(
        self,
        stage: Stage,
        writes: int,
        copy: Path,
        opened: Callable[[], Run],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The process dies at its n-th rename, which is how all that it keeps comes to be there."""
        LOST[stage.name](copy)
        left = writes

        def replace(*arguments: object) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            renamed(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            renamed = os.replace
            patch.setattr("os.replace", replace)
            run = opened()
            with suppress(Killed):
                stage.run(run)
        again = opened()
        if not stage.done(again):
            stage.run(again)
        assert stage.done(opened())


class Killed(BaseException):
    """As if by a signal."""


def test_a_stage_is_named_once_and_needs_those_before_it() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names) and set(LOST) == set(names)
    for index, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(names[:index])


def test_what_stages_leave_is_moved_aside_by_fresh(finished: Path) -> None:
    files = {name for stage in STAGES for name in stage.files}
    ours = {path.name for path in (finished / RUN).iterdir()} - {
        ".hydra",
        ".lock",
        "search.log",
        "checkpoint",
        "history.parquet",
    }
    assert ours <= files


@pytest.mark.parametrize("stages", ["[]", "search", "[serch]", "[build,5]"])
def test_stages_are_a_list_of_their_names(
    stages: str, call: Call, refusal: Callable[[CompletedProcess[str]], str]
) -> None:
    line = refusal(call(SMOKE, f"stages={stages}"))
    assert "must be a list of some of build, search, evaluate, export" in line
