"""The stage `export`: the searched model in a folder that other tools load."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel

from search.evaluation.fitness import CrossEntropy
from search.evaluation.generation import GenerationEvaluator
from search.export.base import Pruned
from search.export.card import Facts, model_card
from search.export.check import SEQUENCES, Checked, Sample
from search.run.shared import Run, sparsest
from search.run.stages.evaluate import METRICS
from supernet.errors import InputError
from supernet.models.architecture import parameter_count
from supernet.models.modeling_pruned import PrunedMixin
from supernet.store import Supernet

FOLDER = "export"


class Export:
    """Writes the folder `export`, and notes in `metrics.json`, if that is there, how it was checked."""

    name: ClassVar[str] = "export"
    needs: ClassVar[tuple[str, ...]] = ("search",)
    files: ClassVar[tuple[str, ...]] = (FOLDER,)

    def done(self, run: Run) -> bool:
        """Whether the folder is there, and the metrics know of it.

        A run that was killed between the two writes, or was measured after it was exported, exports once more.
        """
        metrics = run.directory.read(METRICS)
        return (run.directory.path / FOLDER).exists() and (metrics is None or "export" in metrics)

    def run(self, run: Run) -> None:
        """Build the searched model along its allocation, unless it is built, and write it."""
        metrics, allocation = run.directory.read(METRICS), run.directory.read("allocation.json") or {}
        supernet = run.supernets.rebuilt(run.rounds.found(run.rounds.searched()).kept, "searched")
        with run.directory.stage("export"):
            sample = _sample(run, supernet) if run.components.exporter.check else None
            model = run.assembled(supernet)
            _check_measured(model, metrics)
            facts = _facts(run, isinstance(model, PrunedMixin))

            def card(checked: Checked | None) -> str:
                return model_card(facts, metrics, allocation, checked)

            loaded = run.inputs.loaded
            given = model, supernet, sparsest(supernet), loaded.tokenizer, run.export_dtype
            pruned = Pruned(*given, sample=sample, source=loaded.folder)
            checked = run.components.exporter.write(pruned, run.directory.path / FOLDER, card)
        if metrics is not None:
            of_export = {"dtype": facts.dtype, "check": None if checked is None else asdict(checked)}
            run.directory.write(METRICS, metrics | {"stages": run.directory.costs(), "export": of_export})


def _check_measured(model: PreTrainedModel, metrics: Mapping[str, Any] | None) -> None:
    """InputError where the metrics are of another model than the one that is to be exported."""
    if metrics is None:
        return
    measured, count = metrics["searched"]["parameters"], parameter_count(model)
    if measured != count:
        raise InputError(
            f"metrics.json is of a model with {measured:,} parameters, to be exported is one with {count:,}; take "
            "metrics.json away to measure again"
        )


def _sample(run: Run, supernet: Supernet) -> Sample:
    """A few held-out sequences with the losses that the search's way of measuring gives for a last rebuild."""
    text = run.inputs.tokens["evaluation"]
    ids = text.ids[:SEQUENCES]
    model, resources = run.inputs.model_on_device(), run.inputs.resources
    with closing(GenerationEvaluator(model, supernet, ids, CrossEntropy(), resources, text.unscored)) as evaluate:
        losses = evaluate([sparsest(supernet)], np.arange(len(ids)))[0]
    return Sample(ids, text.unscored, tuple(map(float, losses)), run.export_dtype)


def _facts(run: Run, trust: bool) -> Facts:
    """What the card says of the run."""
    components, loaded = run.components, run.inputs.loaded
    return Facts(
        name=loaded.name,
        pruner=components.pruner.name,
        strategy=components.strategy.name,
        rule=components.strategy.is_rule,
        goal=components.fitness.goal,
        dtype=str(run.export_dtype).removeprefix("torch."),
        trust=trust,
        source=loaded.folder,
    )
