"""The stages in order: build and search, round by round, then evaluate and export.

Everything is resumable: each step first looks for its result in the run's directory or in the supernet folder.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers import PreTrainedModel

from local_prune.walk import activation_bytes
from search.budget import Budget, closest, uniform
from search.evaluate import HeldOut
from search.evaluator import GenerationEvaluator
from search.export.huggingface import export
from search.job import Job
from search.levels import exact
from search.progress import clock, track
from search.report import allocation_json, metrics_table, model_card
from search.run_directory import RunDirectory
from search.settings import check_settings
from search.strategies.base import Problem, State
from supernet.assemble import assemble
from supernet.errors import InputError
from supernet.space import Allocation, Space
from supernet.store import Supernet

log = logging.getLogger(__name__)

STAGES = ("build", "search", "evaluate", "export")
NOT_SETTINGS = ("stages", "dry_run", "fresh", "run_name", "device")  # may change between runs in the same directory
Kept = dict[str, int]  # members kept per unit


def run(config: DictConfig, path: Path) -> None:
    """One run of the chosen stages in the directory `path`."""
    check_settings(config)
    stages = _stages(config)
    job = Job(config, RunDirectory(path, _settings(config), bool(config.fresh)))
    if config.dry_run:
        _describe(job)
        return
    kept = _rounds(job, stages)
    if kept is None:
        return
    if "evaluate" in stages:
        _evaluate(job, kept)
    if "export" in stages:
        _export(job, kept)
    _summarise(job)


def _stages(config: DictConfig) -> list[str]:
    stages = config.stages
    if not isinstance(stages, ListConfig) or not stages or not set(stages) <= set(STAGES):
        raise InputError(f"stages={stages} must be a list of some of {', '.join(STAGES)}, such as stages=[build,search]")
    return list(stages)


def _settings(config: DictConfig) -> dict[str, Any]:
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items() if key not in NOT_SETTINGS}


def _rounds(job: Job, stages: list[str]) -> Kept | None:
    """Build and search, coarse to fine; None where the chosen stages end before an allocation is found."""
    space, mixture = job.grid.first(job.parts)
    budget = Budget.from_sparsity(float(job.config.budget.sparsity), space)
    start = uniform(space, budget)
    kept: Kept = {}
    for index in range(int(job.config.rounds)):
        if index:
            space, mixture = job.grid.around(job.parts, kept, index)
            start = closest(space, space.nearest(kept), budget)
        title = f"round {index + 1} of {job.config.rounds}"
        state = job.directory.load_state(index)
        if state is None or not _finished(job, state):
            supernet = job.supernet(space, mixture, f"{title}: build", "build" in stages)
            if "search" not in stages:
                log.info("%s: the supernet is %s", title, supernet.path)
                return None
            state = _search(job, index, supernet, budget, start, title)
        kept = space.kept(state.parent)
        _write_allocation(job, space, state.parent, budget)
    return kept


def _finished(job: Job, state: State) -> bool:
    return state.exhausted or state.generation >= int(job.config.strategy.generations)


def _search(job: Job, index: int, supernet: Supernet, budget: Budget, start: Allocation, title: str) -> State:
    """Generations from the last checkpoint to the end."""
    strategy = instantiate(job.config.strategy)
    evaluator = GenerationEvaluator(job.model_on_device, supernet, job.tokens["search"].ids, int(job.config.fitness.batch))
    problem = Problem(supernet.space, budget, start, evaluator)
    state = job.directory.load_state(index) or strategy.begin(problem, int(job.config.seed) + index)
    with job.directory.stage("search"):
        for _ in track(range(state.generation, strategy.generations), f"{title}: search"):
            state, rows = strategy.advance(problem, state)
            job.directory.save_state(index, state, rows)
            if state.exhausted:
                log.info("%s: no further allocation meets the budget; the search ends early", title)
                break
    return state


def _write_allocation(job: Job, space: Space, allocation: Allocation, budget: Budget) -> None:
    model = {"name": job.loaded.name, "fingerprint": job.loaded.fingerprint}
    job.directory.write("allocation.json", allocation_json(space, allocation, budget, model))


def _rebuilt(job: Job, kept: Kept, title: str) -> PreTrainedModel:
    """The model of an allocation, its candidates built once more along it with exact error accumulation."""
    space, mixture = exact(job.parts, kept)
    supernet = job.supernet(space, mixture, f"{title} model: last rebuild")
    return assemble(job.model_on_device, supernet, [len(unit.levels) - 1 for unit in space.units])


def _evaluate(job: Job, kept: Kept) -> None:
    """Write `metrics.json`, unless it is there."""
    if job.directory.read("metrics.json") is not None:
        return
    space = job.finest_space
    budget = Budget.from_sparsity(float(job.config.budget.sparsity), space)
    models = {
        "uniform": _rebuilt(job, space.kept(uniform(space, budget)), "uniform"),
        "searched": _rebuilt(job, kept, "searched"),
    }
    ids, batch = job.tokens["evaluation"].ids, int(job.config.evaluate.batch)
    with job.directory.stage("evaluate"):
        held_out = HeldOut(job.model_on_device, ids, batch, track)
        metrics: dict[str, Any] = {"dense": asdict(held_out.dense)}
        for name, model in models.items():
            metrics[name] = asdict(held_out.measure(model, name))
    states = [job.directory.load_state(index) for index in range(int(job.config.rounds))]
    metrics |= {
        "evaluation_tokens": ids.numel(),
        "search_forward_tokens": sum(state.tokens for state in states if state),
        "stages": job.directory.costs(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    job.directory.write("metrics.json", metrics)


def _export(job: Job, kept: Kept) -> None:
    """Write the folder `export`, unless it is there."""
    folder = job.directory.path / "export"
    if folder.exists():
        return
    metrics, allocation = job.directory.read("metrics.json"), job.directory.read("allocation.json")
    model = _rebuilt(job, kept, "searched")
    with job.directory.stage("export"):
        export(model, job.loaded.tokenizer, folder, model_card(job.loaded.name, metrics, allocation))
    if metrics is not None:
        job.directory.write("metrics.json", metrics | {"stages": job.directory.costs()})


def _summarise(job: Job) -> None:
    """The table at the end."""
    metrics = job.directory.read("metrics.json")
    if metrics is not None:
        log.info("on %s held-out tokens:\n%s", f"{metrics['evaluation_tokens']:,}", metrics_table(metrics))
    seconds = {name: cost["seconds"] for name, cost in job.directory.costs().items()}
    peak = max((cost["peak_memory_bytes"] for cost in job.directory.costs().values()), default=0)
    log.info("%s; peak memory %.2f GB", ", ".join(f"{name} {clock(value)}" for name, value in seconds.items()), peak / 1e9)
    log.info("results are in %s", job.directory.path)


def _describe(job: Job) -> None:
    """What `dry_run=true` prints: the space, the budget, and what the run would cost."""
    space, _ = job.grid.first(job.parts)
    budget = Budget.from_sparsity(float(job.config.budget.sparsity), space)
    stored = 0
    for part, unit in zip(job.parts, space.units, strict=True):
        weight = part.projection.weight
        stored += sum(level.kept * part.width for level in unit.levels[1:]) * weight.shape[0] * weight.element_size()
    rounds = int(job.config.rounds)
    log.info("%s: %d units, %d levels", job.loaded.name, len(space.units), sum(len(unit.levels) for unit in space.units))
    log.info("budget: %s of %s prunable parameters", f"{budget.target:,}", f"{budget.dense:,}")
    log.info("supernets: about %.3f GB on disk for each of %d rounds", stored / 1e9, rounds)
    per_token = activation_bytes(job.parts, str(job.config.prune.fit))
    calibration = int(job.config.data.sequences.calibration * job.config.data.sequence_length)
    log.info("build: %s calibration tokens through the model in each of %d builds", f"{calibration:,}", rounds + 2)
    log.info("build: about %.2f GB of main memory for their activations", calibration * per_token / 1e9)
    strategy = instantiate(job.config.strategy)
    log.info("search: about %s forward tokens", f"{rounds * strategy.generations * strategy.tokens_per_generation:,}")
