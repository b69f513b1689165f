"""Measures models on several held-out texts: of the run's own kind, and of others that they were not calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from search.evaluate.held_out import HeldOut, Metrics, Track, difference
from search.evaluation.teacher import TeacherTargets
from search.inputs.data import TokenSet

# What was measured, by the name of the text and then by that of the model.
Measured = dict[str, dict[str, Metrics]]


def measure_all(
    dense: PreTrainedModel,
    texts: Mapping[str, TokenSet],
    models: Mapping[str, Callable[[], PreTrainedModel]],
    batch: int,
    track: Track,
    room: Callable[[int], TeacherTargets],
    measured: Callable[[str, PreTrainedModel], None] = lambda title, model: None,
) -> Measured:
    """Measure the dense model and others on every text; each of the others is made once, and one exists at a time.

    Args:
        dense: The dense model.
        texts: The held-out texts, by name.
        models: Functions that make each of the other models, by its name.
        batch: How many sequences pass through a model together.
        track: Draws progress.
        room: Makes an empty store for the dense model's side of a text, of as many stores as it is given: all of them
            exist at a time.
        measured: Called with each model's name and the model once it is measured, while it is there.
    """
    held_out = {
        name: HeldOut(dense, text.ids, batch, track, text.unscored, room(len(texts))) for name, text in texts.items()
    }
    found: Measured = {name: {"dense": on.dense} for name, on in held_out.items()}
    measured("dense", dense)
    for title, make in models.items():
        model = make()
        for name, on in held_out.items():
            found[name][title] = on.measure(model, title)
        measured(title, model)
        del model
    return found


def further_json(measured: Measured, texts: Mapping[str, TokenSet]) -> dict[str, Any]:
    """Return what `metrics.json` has of further texts: for each of them its tokens, the models and their difference."""
    return {
        name: {"tokens": text.ids.numel()}
        | {title: _of_text(metrics) for title, metrics in measured[name].items()}
        | {"searched_minus_uniform": difference(measured[name]["searched"], measured[name]["uniform"])}
        for name, text in texts.items()
    }


def _of_text(metrics: Metrics) -> dict[str, Any]:
    """Return the metrics that differ from text to text, which the numbers of parameters do not."""
    return {key: value for key, value in metrics.to_json().items() if not key.endswith("parameters")}
