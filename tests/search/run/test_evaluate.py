"""The stage `evaluate` measures what was not measured yet, and loses no measurement by what comes after it."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from search.paths import conf_dir
from search.run.directory import RunDirectory
from search.run.inputs import Inputs
from search.run.latencies import Latencies
from search.run.settings import settings_record
from search.run.shared import Run
from search.run.stages import evaluate
from search.run.stages.evaluate import METRICS, Evaluate
from supernet.errors import InputError

RUN = Path("outputs/search/smoke")
STAGE = Evaluate()


@pytest.fixture
def opened(copy: Path) -> Iterator[Callable[..., Run]]:
    """Opens the finished run of `copy` with other settings, as a new process would."""

    def run(*others: str) -> Run:
        config = compose("search", ["+experiment=smoke", "export.check=false", *others])
        directory = RunDirectory(copy / RUN, settings_record(config), fresh=False)
        found = Run.opened(config, ("evaluate",), directory)
        directory.identify(found.inputs.identity)
        return found

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield run


def metrics_of(run: Run) -> dict[str, Any]:
    metrics = run.directory.read(METRICS)
    assert metrics is not None
    return metrics


def without(metrics: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in names}


def no_measuring(*arguments: object) -> None:
    raise AssertionError("measured again")


def test_another_prompt_measures_nothing_again(opened: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "measure_all", no_measuring)
    run = opened("evaluate.prompt=or not")
    before = metrics_of(run)
    assert before["continuations"]["prompt"] == "to be" and not STAGE.done(run)
    STAGE.run(run)
    after = metrics_of(run)
    assert list(after["continuations"]) == ["prompt", "dense", "uniform", "searched"]
    assert without(after, "continuations", "stages") == without(before, "continuations", "stages")
    assert STAGE.done(run) and STAGE.done(opened())
    assert STAGE.done(opened("evaluate.prompt=or not to be", "evaluator.resident=blocks"))  # without effect


def test_a_further_text_is_measured_once_it_can_be_had(
    opened: Callable[..., Run], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = copy / "further.txt"
    shutil.copy(Path(__file__), text)
    asked = f"evaluate.text=[{text}]"
    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "further_texts", {})  # as without a network
        assert STAGE.done(opened(asked))
    run = opened(asked)
    before = metrics_of(run)
    assert before["texts"] == {} and not STAGE.done(run)
    STAGE.run(run)
    assert list(metrics_of(run)["texts"]) == [str(text)]
    assert metrics_of(run)["searched"] == before["searched"]
    assert STAGE.done(run) and STAGE.done(opened(asked)) and STAGE.done(opened())


def test_a_model_that_cannot_generate_loses_no_measurement(
    opened: Callable[..., Run], copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def generate(*arguments: object) -> str:
        raise AttributeError("no cache\nin this model")

    monkeypatch.setattr(evaluate, "continuation", generate)
    before = metrics_of(opened())
    (copy / RUN / METRICS).unlink()
    run = opened("evaluate.prompt=to be")
    with caplog.at_level(logging.WARNING, logger=evaluate.__name__):
        STAGE.run(run)
    told = [f"evaluate.prompt: the {one} model does not go on with it: no cache" for one in before["continuations"]]
    assert caplog.messages == told[1:]
    assert metrics_of(run)["searched"] == before["searched"]
    assert metrics_of(run)["continuations"] == {"prompt": "to be"} and STAGE.done(run)


def test_each_model_is_assembled_once(opened: Callable[..., Run], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / RUN / METRICS).unlink()
    made, assembled = [], Run.assembled

    def counted(run: Run, supernet: Any) -> Any:
        made.append(supernet)
        return assembled(run, supernet)

    monkeypatch.setattr(Run, "assembled", counted)
    run = opened("evaluate.prompt=to be")
    STAGE.run(run)
    assert len(made) == 2 and set(metrics_of(run)["continuations"]) == {"prompt", "dense", "uniform", "searched"}


def test_a_latency_that_cannot_be_measured_loses_nothing_else(
    opened: Callable[..., Run], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speedup(*arguments: object) -> None:
        raise InputError("the clock stands still")

    monkeypatch.setattr(evaluate, "given_limits", lambda budget: ["speedup"])
    (copy / RUN / METRICS).unlink()
    with monkeypatch.context() as patch, pytest.raises(InputError):
        patch.setattr(Latencies, "speedup", speedup)
        STAGE.run(opened())
    assert "searched" in metrics_of(opened()) and not STAGE.done(opened())
    monkeypatch.setattr(Latencies, "speedup", lambda *_: {"speedup": 2.0})
    monkeypatch.setattr(evaluate, "warn_if_missed", lambda latency: None)
    monkeypatch.setattr(evaluate, "measure_all", no_measuring)
    STAGE.run(opened())
    assert metrics_of(opened())["latency"] == {"speedup": 2.0} and STAGE.done(opened())
