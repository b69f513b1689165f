"""The stage `evaluate`: the dense, the uniform and the searched model on held-out text."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedModel

from search.budgets.knapsack import uniform
from search.budgets.settings import given_limits
from search.errors import reason
from search.evaluate.continuations import continuation
from search.evaluate.held_out import difference, streamed
from search.evaluate.texts import Measured, further_json, measure_all
from search.inputs.data import TokenSet
from search.report.warnings import warn_if_missed
from search.run.progress import track
from search.run.rounds import Found
from search.run.shared import Run, sparsest
from supernet.store import Supernet

log = logging.getLogger(__name__)

METRICS = "metrics.json"
OWN = ""  # the run's own text, among all that are measured on


class Evaluate:
    """Measures what was found, and writes `metrics.json`."""

    name: ClassVar[str] = "evaluate"
    needs: ClassVar[tuple[str, ...]] = ("search",)
    files: ClassVar[tuple[str, ...]] = (METRICS,)

    def done(self, run: Run) -> bool:
        """Whether `metrics.json` has all that is asked for: the texts, the prompt and the latency."""
        metrics = run.directory.read(METRICS)
        return (
            metrics is not None
            and not (_lacks_text(run, metrics) or _lacks_prompt(run, metrics))
            and ("latency" in metrics or not _limits_latency(run))
        )

    def run(self, run: Run) -> None:
        """Measure the uniform and the searched model, or add what measurements of an earlier command lack.

        What takes long is written before anything else that may fail.
        """
        found = run.rounds.found(run.rounds.searched())
        space = run.rounds.finest.space
        even = uniform(space, run.budget(space))
        supernets = {
            "uniform": run.supernets.rebuilt(space.kept(even), "uniform"),
            "searched": run.supernets.rebuilt(found.kept, "searched"),
        }
        metrics = run.directory.read(METRICS)
        if metrics is None or _lacks_text(run, metrics):
            metrics = _measured_anew(run, found, supernets)
            run.directory.write(METRICS, metrics)
        elif _lacks_prompt(run, metrics):
            with run.directory.stage("evaluate"):
                continuations = _continued(run, supernets)
            metrics |= {"continuations": continuations, "stages": run.directory.costs()}
            run.directory.write(METRICS, metrics)
        if _limits_latency(run) and "latency" not in metrics:
            model = run.assembled(supernets["searched"])
            metrics["latency"] = run.latencies.speedup(model, found.space, found.allocation)
            warn_if_missed(metrics["latency"])
            run.directory.write(METRICS, metrics)


def _lacks_text(run: Run, metrics: Mapping[str, Any]) -> bool:
    """Whether a text was asked for, and can be had, that was not measured on."""
    lacking = set(run.config.evaluate.text) - set(metrics["texts"])
    return bool(lacking) and not lacking.isdisjoint(run.inputs.further_texts)


def _lacks_prompt(run: Run, metrics: Mapping[str, Any]) -> bool:
    """Whether a prompt was asked for that the models did not go on with."""
    prompt = _prompt(run)
    return prompt is not None and metrics.get("continuations", {}).get("prompt") != prompt


def _prompt(run: Run) -> str | None:
    """The prompt; None for none, and where no whole model is on the device to go on with it."""
    prompt, whole = run.config.evaluate.prompt, run.inputs.resources.resident == "model"
    return str(prompt) if prompt is not None and whole else None


def _limits_latency(run: Run) -> bool:
    return "speedup" in given_limits(run.config.budget)


def _measured_anew(run: Run, found: Found, supernets: Mapping[str, Supernet]) -> dict[str, Any]:
    """The content of `metrics.json`, without a latency."""
    texts = {OWN: run.inputs.tokens["evaluation"]} | run.inputs.further_texts
    prompt = _prompt(run)
    continuations = {} if prompt is None else {"prompt": prompt}
    with run.directory.stage("evaluate"):
        if run.inputs.resources.resident == "blocks":
            measured = _measured_by_blocks(run, supernets, texts)
        else:
            measured = _measured(run, supernets, texts, continuations)
    return _metrics(run, found, supernets, measured) | ({"continuations": continuations} if continuations else {})


def _metrics(run: Run, found: Found, supernets: Mapping[str, Supernet], of_texts: Measured) -> dict[str, Any]:
    """What `metrics.json` has of all measurements."""
    measured = of_texts[OWN]
    models: dict[str, Any] = {"dense": measured["dense"].to_json() | {"kept": 1.0}}
    for name, supernet in supernets.items():
        kept = supernet.space.lowest_cost / supernet.space.dense_cost
        models[name] = measured[name].to_json() | {"kept": kept}
    return models | {
        "searched_minus_uniform": difference(measured["searched"], measured["uniform"]),
        "evaluation_tokens": run.inputs.tokens["evaluation"].ids.numel(),
        "texts": further_json(of_texts, run.inputs.further_texts),
        "search_forward_tokens": found.tokens,
        "stages": run.directory.costs(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _measured(
    run: Run, supernets: Mapping[str, Supernet], texts: Mapping[str, TokenSet], continuations: dict[str, str]
) -> Measured:
    """The dense model and those of last rebuilds, as they will be exported, on every text.

    Each of them goes on with the prompt of `continuations`, if there is one, before the next is assembled.
    """
    models = {name: partial(run.assembled, supernet) for name, supernet in supernets.items()}
    batch, room = int(run.config.evaluate.batch), run.inputs.resources.teacher_targets
    follow = partial(_go_on, run, continuations)
    return measure_all(run.inputs.model_on_device(), texts, models, batch, track, room, follow)


def _continued(run: Run, supernets: Mapping[str, Supernet]) -> dict[str, str]:
    """The prompt of `evaluate.prompt`, and how each model goes on with it."""
    continuations = {"prompt": str(_prompt(run))}
    _go_on(run, continuations, "dense", run.inputs.model_on_device())
    for name, supernet in supernets.items():
        _go_on(run, continuations, name, run.assembled(supernet))
    return continuations


def _go_on(run: Run, continuations: dict[str, str], name: str, model: PreTrainedModel) -> None:
    """Add how a model goes on with the prompt, if there is one; a model that cannot is told, and left out."""
    if "prompt" not in continuations:
        return
    text = run.inputs.tokens["evaluation"]
    leading = text.ids[0, : text.leading].tolist()
    try:
        continuations[name] = continuation(model, run.inputs.loaded.tokenizer, continuations["prompt"], leading)
    except Exception as error:  # whatever the model's own code raises: what was measured must not be lost by it
        log.warning("evaluate.prompt: the %s model does not go on with it: %s", name, reason(error))


def _measured_by_blocks(run: Run, supernets: Mapping[str, Supernet], texts: Mapping[str, TokenSet]) -> Measured:
    """The same where the device has room for no more than the block at work."""
    model, any_supernet = run.inputs.model_on_device(), next(iter(supernets.values()))
    if torch.finfo(run.export_dtype).eps > torch.finfo(model.dtype).eps:
        log.warning("measured in %s; the export's weights are rounded to %s after that", model.dtype, run.export_dtype)
    found: Measured = {}
    for on, text in texts.items():
        measure = partial(streamed, model, ids=text.ids, resources=run.inputs.resources, unscored=text.unscored)
        found[on] = {"dense": measure(any_supernet, (0,) * len(any_supernet.space.units), counted=model)}
        for name, supernet in supernets.items():
            found[on][name] = measure(supernet, sparsest(supernet), counted=run.assembled(supernet))
    return found
