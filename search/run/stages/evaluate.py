"""The stage `evaluate`: the dense, the uniform and the searched model on held-out text."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import transformers

from search.budgets.knapsack import uniform
from search.budgets.settings import given_limits
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
        """Whether `metrics.json` is there."""
        return run.directory.read(METRICS) is not None

    def run(self, run: Run) -> None:
        """Build the uniform and the searched model along their allocations, measure them, and write."""
        found = run.rounds.found(run.rounds.searched())
        space = run.rounds.finest.space
        even = uniform(space, run.budget(space))
        supernets = {
            "uniform": run.supernets.rebuilt(space.kept(even), "uniform"),
            "searched": run.supernets.rebuilt(found.kept, "searched"),
        }
        texts = {OWN: run.inputs.tokens["evaluation"]} | run.inputs.further_texts
        with run.directory.stage("evaluate"):
            blocks = run.inputs.resources.resident == "blocks"
            measured = (_measured_by_blocks if blocks else _measured)(run, supernets, texts)
        metrics = _metrics(run, found, supernets, measured)
        if "speedup" in given_limits(run.config.budget):
            model = run.assembled(supernets["searched"])
            metrics["latency"] = run.latencies.speedup(model, found.space, found.allocation)
            warn_if_missed(metrics["latency"])
        if run.config.evaluate.prompt is not None and not blocks:
            metrics["continuations"] = _continuations(run, supernets)
        run.directory.write(METRICS, metrics)


def _metrics(run: Run, found: Found, supernets: Mapping[str, Supernet], of_texts: Measured) -> dict[str, Any]:
    """The content of `metrics.json`, without a latency."""
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


def _measured(run: Run, supernets: Mapping[str, Supernet], texts: Mapping[str, TokenSet]) -> Measured:
    """The dense model and those of last rebuilds, as they will be exported, on every text."""
    models = {name: partial(run.assembled, supernet) for name, supernet in supernets.items()}
    batch, room = int(run.config.evaluate.batch), run.inputs.resources.teacher_targets
    return measure_all(run.inputs.model_on_device(), texts, models, batch, track, room)


def _continuations(run: Run, supernets: Mapping[str, Supernet]) -> dict[str, str]:
    """The prompt of `evaluate.prompt`, and how each model goes on with it."""
    inputs, prompt = run.inputs, str(run.config.evaluate.prompt)
    text = inputs.tokens["evaluation"]
    leading = text.ids[0, : text.leading].tolist()
    found = {
        "prompt": prompt,
        "dense": continuation(inputs.model_on_device(), inputs.loaded.tokenizer, prompt, leading),
    }
    for name, supernet in supernets.items():
        found[name] = continuation(run.assembled(supernet), inputs.loaded.tokenizer, prompt, leading)
    return found


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
