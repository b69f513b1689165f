"""How long the model of a run takes: the latencies that its budget needs, measured once, and the final speed-up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from search.budgets.costs import CostTable
from search.budgets.from_settings import request_of
from search.budgets.latency import LatencyTable, ModelToTime, check_faster
from search.budgets.settings import given_limits
from search.budgets.timing import speedup, warn_if_busy
from search.run.directory import RunDirectory
from search.run.inputs import Inputs
from search.run.progress import track
from supernet.errors import InputError
from supernet.space import Allocation, Space

log = logging.getLogger(__name__)


class Latencies:
    """What the units of a run's model take on this machine: the same for the whole run, also when it is resumed."""

    def __init__(self, budget: Mapping[str, Any], inputs: Inputs, directory: RunDirectory, keep: bool) -> None:
        """Take what is needed to measure; nothing is measured yet.

        Args:
            budget: The settings `budget.*`.
            inputs: The model and the device.
            directory: Keeps what was measured.
            keep: Whether to write it there; a dry run does not.
        """
        self._budget, self._inputs, self._directory, self._keep = budget, inputs, directory, keep

    @cached_property
    def _table(self) -> LatencyTable:
        model = self._inputs.loaded.model
        return LatencyTable(model, request_of(self._budget), self._inputs.device, model.dtype)

    def unmeasured(self, space: Space) -> list[ModelToTime]:
        """What `costs` would have to measure for a space first; nothing where no speed-up is asked for."""
        given = given_limits(self._budget)
        if "speedup" not in given:
            return []
        check_faster(space, f"budget.speedup={given['speedup']}")
        return self._table.missing(space)

    def costs(self, space: Space) -> CostTable:
        """Nanoseconds of each level of each unit; what is not known yet is measured."""
        known = self._directory.latencies(space)
        if known is not None:
            return known
        if missing := self._table.missing(space):
            if self._inputs.resources.resident == "blocks" and self._inputs.device.type != "cpu":
                raise InputError(
                    "budget.speedup needs the whole model on the device to measure it; use evaluator.resident=model"
                )
            self._inputs.model_on_device()
            log.info("latency: %d models to time beside the dense one, once for all runs on this machine", len(missing))
            self._table.measure(space, track)
            log.info("latency: kept in %s", self._table.path)
        costs = self._table.costs(space)
        if self._keep:
            self._directory.keep_latencies(space, costs)
        return costs

    def speedup(self, pruned: PreTrainedModel, space: Space, allocation: Allocation) -> dict[str, Any]:
        """How much faster the pruned model of an allocation is, measured, and as its latencies promised."""
        table = self.costs(space)
        promised = table.rest + sum(row[level] for row, level in zip(table.costs, allocation, strict=True))
        measured = speedup(self._inputs.model_on_device(), pruned, request_of(self._budget))
        warn_if_busy([table.dense / 1e9, measured["dense_seconds"]])
        asked = given_limits(self._budget)["speedup"]
        return measured | {"asked": asked, "promised": round(table.dense / promised, 4)}
