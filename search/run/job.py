"""What the stages of a run share: model, text, levels and supernets, each made when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.estimate import estimate
from local_prune.identity import build_record, reads_text
from local_prune.pruner import Calibration, Pruner
from local_prune.text.dense_stream import DenseStream
from local_prune.text.passes import TextWalk
from local_prune.walk import build
from search.budgets.budget import Budget
from search.budgets.costs import CostTable
from search.budgets.from_settings import make_budget, request_of
from search.budgets.latency import LatencyTable, Point, check_faster, speedup, warn_if_busy
from search.budgets.settings import given_limits
from search.evaluation.fitness import Fitness
from search.evaluation.generation import Resources
from search.inputs.data import TokenSet, check_ids, check_sequence_length, prepare, split_record
from search.inputs.models import LoadedModel, dtype_of
from search.inputs.models.loaded import DTYPES
from search.paths import cache_dir
from search.run.directory import RunDirectory
from search.run.levels import Grid, Mixture, Window, check_accumulation, exact, mixture
from search.run.progress import track
from search.run.settings import check_types
from search.strategies.base import Dense, Strategy
from search.values import read_bytes
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import check_family
from supernet.models.forward import check_walk
from supernet.models.prunables import Prunable
from supernet.space import ATTENTION, HEADS, MLP, Allocation, Space
from supernet.store import Supernet

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A run's configuration and directory, and what follows from them."""

    config: DictConfig
    directory: RunDirectory

    @cached_property
    def loaded(self) -> LoadedModel:
        """The dense model, in main memory: the build lends the device one block at a time."""
        dtype = dtype_of(str(self.config.dtype), self.device)
        loaded: LoadedModel = instantiate(self.config.model, dtype=dtype)
        return loaded

    @property
    def _dtype(self) -> str:
        return str(self.loaded.model.dtype).removeprefix("torch.")

    def model_on_device(self) -> PreTrainedModel:
        """The dense model moved to the run's device, for evaluation; with `evaluator.resident=blocks` it stays where it
        is.
        """
        model = self.loaded.model
        if self.resources.resident == "model":
            model.to(self.device)  # type: ignore[arg-type]
        return model

    @cached_property
    def device(self) -> torch.device:
        """Where the work is done: `device=auto` takes a GPU if there is one."""
        name = str(self.config.device)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0].partition(". ")[0]
            why = why if len(why) < 100 else "torch knows no such device here"
            raise InputError(
                f"device={name} cannot be used here ({why}); use device=cpu, or cuda with a GPU"
            ) from error
        return torch.device(name)

    @cached_property
    def prunables(self) -> tuple[Prunable, ...]:
        """What the pruner prunes of the model."""
        model = self.loaded.model
        check_walk(model)
        found = self.pruner.prunables(sub_blocks(model))
        check_family(model, structured=found[0].kind in (ATTENTION, MLP, HEADS))
        return found

    @cached_property
    def export_dtype(self) -> torch.dtype:
        """Of the weights in the exported file: the checkpoint's unless another is asked for."""
        name = self.config.export.dtype
        if name is None:
            return self.loaded.stored_dtype or self.loaded.model.dtype
        if name not in DTYPES:
            raise InputError(
                f"export.dtype={name} is not one that models are written in; use null, {', '.join(DTYPES)}"
            )
        return DTYPES[name]

    def budget(self, space: Space) -> Budget:
        """What an allocation of this space may cost; latencies that are not known yet are measured."""
        return make_budget(self.config.budget, self.loaded.model, space, self.latencies, self.export_dtype)

    def unmeasured(self, space: Space) -> list[Point]:
        """The latencies that `budget` would measure."""
        given = given_limits(self.config.budget)
        if "speedup" not in given:
            return []
        check_faster(space, f"budget.speedup={given['speedup']}")
        return self._latency_table.missing(space)

    def latencies(self, space: Space) -> CostTable:
        """Nanoseconds that each level of each unit takes on this machine, the same for the whole run."""
        known = self.directory.latencies(space)
        if known is not None:
            return known
        table = self._latency_table
        if missing := table.missing(space):
            if self.resources.resident == "blocks" and self.device.type != "cpu":
                raise InputError(
                    "budget.speedup needs the whole model on the device to measure it; use evaluator.resident=model"
                )
            self.model_on_device()
            log.info("latency: %d models to time beside the dense one, once for all runs on this machine", len(missing))
            table.measure(space, track)
            log.info("latency: kept in %s", table.path)
        costs = table.costs(space)
        if not self.config.dry_run:
            self.directory.keep_latencies(space, costs)
        return costs

    def speedup(self, pruned: PreTrainedModel, space: Space, allocation: Allocation) -> dict[str, Any]:
        """How much faster the pruned model of an allocation is, measured, and as its latencies promised."""
        table = self.latencies(space)
        promised = table.rest + sum(row[level] for row, level in zip(table.costs, allocation, strict=True))
        measured = speedup(self.model_on_device(), pruned, request_of(self.config.budget))
        warn_if_busy([table.dense / 1e9, measured["dense_seconds"]])
        asked = given_limits(self.config.budget)["speedup"]
        return measured | {"asked": asked, "promised": round(table.dense / promised, 4)}

    @cached_property
    def _latency_table(self) -> LatencyTable:
        model = self.loaded.model
        return LatencyTable(model, request_of(self.config.budget), self.device, model.dtype)

    @cached_property
    def tokens(self) -> dict[str, TokenSet]:
        """Calibration, search and evaluation tokens."""
        data = self.config.data
        source, sequences = instantiate(data.source), dict(data.sequences)
        length, seed = int(data.sequence_length), int(self.config.seed)
        check_sequence_length(self.loaded.model, length)
        parts = prepare(source, self.loaded.tokenizer, sequences, length, seed, data.bos)
        check_ids(self.loaded.model, parts)
        return parts

    @property
    def identity(self) -> dict[str, Any]:
        """What the run works on, and how the text was split."""
        model = {"name": self.loaded.name, "fingerprint": self.loaded.fingerprint, "dtype": self._dtype}
        return {"model": model, "data": split_record(self.tokens)}

    @cached_property
    def fitness(self) -> Fitness:
        """What the search minimises."""
        check_types(self.config, "fitness")
        fitness: Fitness = instantiate(self.config.fitness)
        return fitness

    @property
    def resources(self) -> Resources:
        """Where things lie while allocations are measured."""
        given = self.config.evaluator
        memory, cache = (read_bytes(f"evaluator.{key}", given[key]) for key in ("memory", "cache"))
        return Resources(self.device, str(given.resident), memory, cache, self.directory.path)

    @cached_property
    def strategy(self) -> Strategy[Any]:
        """The search."""
        strategy: Strategy[Any] = instantiate(self.config.strategy)
        return strategy

    @cached_property
    def pruner(self) -> Pruner:
        """The local pruner."""
        check_accumulation(self.accumulation)
        check_types(self.config, "prune.pruner")
        pruner: Pruner = instantiate(self.config.prune.pruner)
        return pruner

    @property
    def accumulation(self) -> str:
        """What the next sub-block sees while candidates are built; methods that look at no inputs have no such
        setting.
        """
        prune = self.config.prune
        return str(prune.accumulation) if "accumulation" in prune else "none"

    @cached_property
    def grid(self) -> Grid:
        """Levels of all rounds."""
        return Grid(
            int(self.config.supernet.levels), float(self.config.supernet.step), float(self.config.supernet.lowest)
        )

    @cached_property
    def finest(self) -> Window:
        """Every level that the last round could reach anywhere: where the uniform baseline is taken from."""
        step = self.grid.step / 2 ** (int(self.config.rounds) - 1)
        return Grid(ceil(1.0 / step - 1e-9) + 1, step).first(self.prunables)

    @cached_property
    def first_window(self) -> Window:
        """The levels of the first round; all of the last one for a strategy that needs no candidates: they cost it
        nothing.
        """
        return self.grid.first(self.prunables) if self.strategy.needs_candidates else self.finest

    @cached_property
    def rounds(self) -> int:
        """How many of the rounds asked for make a difference.

        Levels that are fixed (of patterns, of bit widths, of depth) are the same in every round, and so are their
        candidates, unless these are built along the allocation that the last round found (`prune.accumulation=chosen`).
        """
        fixed = all(one.choices is not None for one in self.prunables) and self.accumulation != "chosen"
        return 1 if fixed or not self.strategy.needs_candidates else int(self.config.rounds)

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration text and how it is used."""
        given = {key: self.config.prune[key] for key in ("batch", "fit") if key in self.config.prune}
        text = self.tokens["calibration"]
        return Calibration(text.ids, **given, unscored=text.unscored)

    @property
    def dense(self) -> Dense:
        """What allocation rules look at."""
        calibration = self.calibration
        return Dense(self.loaded.model, calibration.ids, calibration.batch, self.device)

    @cached_property
    def dense_stream(self) -> DenseStream:
        """The dense model's residual stream of the calibration text: computed in a run's first build."""
        ids, batch = self.calibration.ids, self.calibration.batch
        return DenseStream(TextWalk(self.loaded.model, self.device), ids, batch, self.directory.path)

    @cached_property
    def scores(self) -> Mapping[str, Tensor]:
        """What the pruner's survey of the dense model found: once for all supernets of a run."""
        return self.pruner.survey(self.loaded.model, self.calibration, self.device, track)

    def rebuild(self, kept: Mapping[str, int], title: str) -> Supernet:
        """The candidates of one allocation, built once more along it with exact error accumulation."""
        return self.supernet(*exact(self.prunables, kept, self.accumulation), f"{title} model: last rebuild")

    def supernet_around(self, window: Window, around: Allocation, title: str, may_build: bool) -> Supernet:
        """The supernet of a round: its window of levels, and the allocation known before it."""
        return self.supernet(window.space, mixture(window, self.accumulation, around), title, may_build)

    def supernet(self, space: Space, weights: Mixture, title: str, may_build: bool = True) -> Supernet:
        """The finished supernet of a space: found on disk, continued, or built."""
        given = self.loaded.model, self.calibration, self.pruner
        text = self.tokens["calibration"].fingerprint if reads_text(*given) else None
        description = {
            "model": self.loaded.fingerprint,
            "dtype": self._dtype,
            "data": text,
            "build": build_record(*given, space, weights, self.device),
        }
        root = self.config.supernet.root
        folder = Path(root).expanduser() if root else cache_dir() / "supernets"
        labels = {"model": self.loaded.name, "method": self.pruner.name}
        supernet = Supernet.open_or_create(folder, space, description, labels)
        if supernet.complete or may_build:
            supernet.note_use(self.directory.note_supernet(supernet.fingerprint, supernet.path))
            supernet.refresh()  # until it was noted, another process may have removed what no run referred to
        if supernet.complete:
            log.info("%s: found in %s", title, supernet.path)
        elif not may_build:
            raise InputError(f"{title}: there is no finished supernet in {supernet.path}; add build to stages")
        else:
            model = self.loaded.model
            model.cpu()  # also where a search had it on the device: a resumed run finds it here, and must round alike
            given = model, self.calibration, self.pruner
            log.info("%s: %s", title, estimate(*given, space, weights, self.device, self.dense_stream))
            with self.directory.stage("build"):
                build(*given, supernet, weights, self.device, track, title, self.scores, self.dense_stream)
        return supernet
