"""The stages in order: build and search, round by round, then evaluate and export.

Everything is resumable: each step first looks for its result in the run's directory or in the supernet folder.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from omegaconf import DictConfig, ListConfig
from transformers import PreTrainedModel

from search.budgets.budget import Budget
from search.budgets.knapsack import closest, uniform
from search.budgets.settings import given_limits
from search.evaluate.held_out import HeldOut, Metrics, difference, streamed
from search.evaluation.fitness import CrossEntropy
from search.evaluation.generation import GenerationEvaluator
from search.export.card import Facts, model_card
from search.export.check import SEQUENCES, Checked, Sample
from search.export.huggingface import Wanted, export, rounded
from search.report.table import allocation_json, metrics_table
from search.run.directory import RunDirectory, locked
from search.run.dry_run import describe
from search.run.job import Job
from search.run.progress import clock, track
from search.run.settings import check_settings, settings_record, without_effect
from search.strategies.base import FrontPoint, Problem, Unmeasurable
from search.strategies.rules.front import front_json
from search.strategies.state import State
from search.trackers.optuna import Trials
from supernet.errors import InputError
from supernet.models.architecture import parameter_count
from supernet.models.assemble import assemble
from supernet.models.modeling_pruned import PrunedMixin
from supernet.space import Allocation, Space
from supernet.store import Supernet
from supernet.system.memory import keep_freed_memory

log = logging.getLogger(__name__)

MISSED = 0.05  # of the speed-up asked for
STAGES = ("build", "search", "evaluate", "export")
Kept = dict[str, int]  # members kept per unit


@dataclass(frozen=True)
class Found:
    """Where the rounds of build and search ended."""

    space: Space
    allocation: Allocation
    budget: Budget
    tokens: int  # forward tokens of all rounds
    front: Sequence[FrontPoint] | None = None  # of a search that finds one (`search.strategies.guided.pareto`)

    @property
    def kept(self) -> Kept:
        """Members kept per unit."""
        return self.space.kept(self.allocation)


def run(config: DictConfig, path: Path, typed: Collection[str] = ()) -> None:
    """One run of the chosen stages in the directory `path`; `typed` are the settings that the user gave in the
    command.
    """
    check_settings(config)
    for line in without_effect(config, typed):
        log.warning("%s", line)
    stages, dry = _stages(config), bool(config.dry_run)
    if dry:
        job = Job(config, RunDirectory(path, settings_record(config), fresh=False))
        _ = job.fitness, job.resources, job.export_dtype
        job.strategy.check_rounds(int(config.rounds))
        _check_units(job, typed)
        describe(job)
        return
    keep_freed_memory()
    with locked(path):  # first: fresh=true must not move a run that is at work
        job = Job(config, RunDirectory(path, settings_record(config), bool(config.fresh)))
        # a mistake in their settings should not wait for hours of building
        _ = (job.strategy, job.pruner, job.fitness, job.resources, job.export_dtype)
        job.strategy.check_rounds(int(config.rounds))
        job.directory.identify(job.identity)
        _check_units(job, typed)
        trials = None if config.study is None else Trials(config.study, job.directory)
        found = _rounds(job, stages, trials)
        if found is not None:
            _write_results(job, found, stages)
        job.directory.finish()


def _write_results(job: Job, found: Found, stages: Sequence[str]) -> None:
    """The allocation, and what the stages behind the search make of it."""
    _write_allocation(job, found)
    if not any(found.kept.values()):
        log.warning("nothing is kept of any unit: no level between that and more fits the budget; ask for less")
    if "evaluate" in stages:
        _evaluate(job, found)
    if "export" in stages:
        _export(job, found)
    _summarise(job)


def _stages(config: DictConfig) -> list[str]:
    stages = config.stages
    if not isinstance(stages, ListConfig) or not stages or not set(stages) <= set(STAGES):
        raise InputError(
            f"stages={stages} must be a list of some of {', '.join(STAGES)}, such as stages=[build,search]"
        )
    return list(stages)


def _check_units(job: Job, typed: Collection[str]) -> None:
    """InputError for units that cannot be pruned so, or of which a rule has nothing to say: not after hours of
    building.
    """
    if all(one.choices is not None for one in job.prunables):
        for key in sorted({"supernet.levels", "supernet.step", "supernet.lowest"} & set(typed)):
            log.warning("%s has no effect: the levels of this kind of pruning are fixed", key)
    job.strategy.check_units(job.loaded.model, job.first_window.space)
    if (warning := job.strategy.pool_warning(*job.tokens["search"].ids.shape)) is not None:
        log.warning("%s", warning)


def _rounds(job: Job, stages: list[str], trials: Trials | None) -> Found | None:
    """Build and search, coarse to fine; None where the chosen stages end with a build."""
    window = job.first_window
    budget = job.budget(window.space)
    start = uniform(window.space, budget)
    log.info("budget: %s", budget)
    if (why := why_one_round(job)) is not None:
        log.info("rounds: one, as %s", why)
    job.strategy.check_budget(window.space, budget)
    if not budget.met(start):
        nearest = window.space.cost(start) / window.space.dense_cost
        log.warning(
            "no allocation of the first round comes that near; the search begins at %.1f %% kept", 100 * nearest
        )
    tokens = 0
    for index in range(job.rounds):
        title = f"round {index + 1} of {job.rounds}"
        space = window.space
        state = job.directory.load_state(index, space, job.strategy.generations, job.strategy.state_class)
        if state is None or not _finished(job, state):
            if "search" not in stages and stages != ["build"]:
                raise InputError(f"{title} is not searched yet; add search to stages=[{','.join(stages)}]")
            supernet = None
            if job.strategy.needs_candidates:
                supernet = job.supernet_around(window, start, f"{title}: build", "build" in stages)
            if "search" not in stages:
                found_in = "there is nothing to build before the last rebuilds" if supernet is None else supernet.path
                log.info("%s: the supernet is %s" if supernet else "%s: %s", title, found_in)
                return None
            with _problem(job, supernet, space, budget, start) as problem:
                state = _search(job, index, problem, state, title, trials)
        else:
            log.info("%s: searched before", title)
            _follow(trials, job, index, space)
        tokens += state.tokens
        found = Found(space, state.parent, budget, tokens, job.strategy.front(state))
        if index + 1 < job.rounds:
            window = job.grid.around(job.prunables, found.kept, index + 1)
            budget = job.budget(window.space)
            start = closest(window.space.nearest(found.kept), budget)
    return found


def _finished(job: Job, state: State) -> bool:
    return state.exhausted or state.generation >= job.strategy.generations


def why_one_round(job: Job) -> str | None:
    """Why there is one round where more were asked for; None where there are as many as that."""
    if job.rounds == int(job.config.rounds):
        return None
    if job.strategy.needs_candidates:
        return "the levels of this kind of pruning are fixed, and so are its candidates"
    return "this strategy looks at no candidates: all levels of the last round are there at once, and none are built"


@contextmanager
def _problem(job: Job, supernet: Supernet | None, space: Space, budget: Budget, start: Allocation) -> Iterator[Problem]:
    """What the strategy is to solve in a round; without a supernet nothing can be measured."""
    if supernet is None:
        yield Problem(space, budget, start, Unmeasurable(), job.dense)
        return
    model, text = job.loaded.model, job.tokens["search"]
    with closing(
        GenerationEvaluator(model, supernet, text.ids, job.fitness, job.resources, text.unscored)
    ) as evaluator:
        yield Problem(space, budget, start, evaluator, job.dense, supernet.errors)


def _search(job: Job, index: int, problem: Problem, state: State | None, title: str, trials: Trials | None) -> State:
    """Generations from the last checkpoint, if there is one, to the end."""
    seed = int(np.random.SeedSequence([int(job.config.seed), index]).generate_state(1)[0])
    state = state or job.strategy.begin(problem, seed)
    for _ in track(range(state.generation, job.strategy.generations), f"{title}: search", state.generation):
        with job.directory.stage("search"):
            state, rows = job.strategy.advance(problem, state)
            job.directory.save_state(index, problem.space, state, rows)
            _follow(trials, job, index, problem.space)
        if state.exhausted:
            log.info("%s: nothing is left to try; the search ends early", title)
            break
    return state


def _follow(trials: Trials | None, job: Job, index: int, space: Space) -> None:
    """Copy what is new in the history to the run's study, if it has one."""
    if trials is not None:
        trials.follow(job.directory.history(), index, space)


def _write_allocation(job: Job, found: Found) -> None:
    content = allocation_json(found.space, found.allocation, found.budget, job.identity["model"])
    job.directory.write("allocation.json", content)
    if found.front is not None:
        dense = 0.0 if job.fitness.is_divergence else None
        content = front_json(found.space, found.front, found.budget, job.identity["model"], dense)
        job.directory.write("front.json", content)


def _assembled(job: Job, supernet: Supernet) -> PreTrainedModel:
    """The model of a last rebuild, with weights that the exported file can hold."""
    return rounded(assemble(job.model_on_device(), supernet, _sparsest(supernet)), job.export_dtype)


def _sparsest(supernet: Supernet) -> Allocation:
    """What a last rebuild is of: its only level besides the dense one, where there is one."""
    return tuple(len(unit.levels) - 1 for unit in supernet.space.units)


def _evaluate(job: Job, found: Found) -> None:
    """Write `metrics.json`, unless it is there."""
    if job.directory.read("metrics.json") is not None:
        log.info("measured before: metrics.json is kept")
        return
    space = job.finest.space
    even = uniform(space, job.budget(space))
    supernets = {
        "uniform": job.rebuild(space.kept(even), "uniform"),
        "searched": job.rebuild(found.kept, "searched"),
    }
    with job.directory.stage("evaluate"):
        measured = (_measure_streamed if job.resources.resident == "blocks" else _measure)(job, supernets)
    metrics: dict[str, Any] = {"dense": measured["dense"].to_json() | {"kept": 1.0}}
    for name, supernet in supernets.items():
        kept = supernet.space.lowest_cost / supernet.space.dense_cost
        metrics[name] = measured[name].to_json() | {"kept": kept}
    metrics |= {
        "searched_minus_uniform": difference(measured["searched"], measured["uniform"]),
        "evaluation_tokens": job.tokens["evaluation"].ids.numel(),
        "search_forward_tokens": found.tokens,
        "stages": job.directory.costs(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if "speedup" in given_limits(job.config.budget):
        metrics["latency"] = job.speedup(_assembled(job, supernets["searched"]), found.space, found.allocation)
        warn_if_missed(metrics["latency"])
    job.directory.write("metrics.json", metrics)


def warn_if_missed(latency: Mapping[str, Any]) -> None:
    """Tell the user where the model is clearly not as fast as was asked for."""
    if latency["speedup"] < (1.0 - MISSED) * latency["asked"]:
        why = (
            "other work on this machine may have spoilt one of the measurements; ask for more, or measure again when "
            "it is idle"
        )
        log.warning(
            "the model is %.2f times as fast, not %g times as asked: %s", latency["speedup"], latency["asked"], why
        )


def _measure(job: Job, supernets: Mapping[str, Supernet]) -> dict[str, Metrics]:
    """The dense model and those of last rebuilds, as they will be exported."""
    text, batch = job.tokens["evaluation"], int(job.config.evaluate.batch)
    held_out = HeldOut(job.model_on_device(), text.ids, batch, track, text.unscored, job.resources.teacher_targets())
    found = {"dense": held_out.dense}
    for name, supernet in supernets.items():  # one assembled model at a time
        found[name] = held_out.measure(_assembled(job, supernet), name)
    return found


def _measure_streamed(job: Job, supernets: Mapping[str, Supernet]) -> dict[str, Metrics]:
    """The same where the device has room for no more than the block at work."""
    model, text = job.model_on_device(), job.tokens["evaluation"]
    if torch.finfo(job.export_dtype).eps > torch.finfo(model.dtype).eps:
        log.warning("measured in %s; the export's weights are rounded to %s after that", model.dtype, job.export_dtype)
    measure = partial(streamed, model, ids=text.ids, resources=job.resources, unscored=text.unscored)
    found = {}
    for name, supernet in supernets.items():
        units = supernet.space.units
        if "dense" not in found:
            found["dense"] = measure(supernet, (0,) * len(units), counted=model)
        found[name] = measure(supernet, _sparsest(supernet), counted=_assembled(job, supernet))
    return found


def _export(job: Job, found: Found) -> None:
    """Write the folder `export`, unless it is there and metrics.json, if that is, says how it was checked.

    A run that was killed between the two writes, or was measured after it was exported, exports once more.
    """
    folder = job.directory.path / "export"
    metrics, allocation = job.directory.read("metrics.json"), job.directory.read("allocation.json") or {}
    if folder.exists() and (metrics is None or "export" in metrics):
        log.info("exported before: %s is kept", folder)
        return
    supernet = job.rebuild(found.kept, "searched")
    with job.directory.stage("export"):
        sample = _sample(job, supernet) if job.config.export.check else None
        model = _assembled(job, supernet)
        if metrics is not None and metrics["searched"]["parameters"] != (count := parameter_count(model)):
            raise InputError(
                f"metrics.json is of a model with {metrics['searched']['parameters']:,} parameters, to be exported is "
                f"one with {count:,}; take metrics.json away to measure again"
            )
        facts = _facts(job, isinstance(model, PrunedMixin))

        def card(checked: Checked | None) -> str:
            return model_card(facts, metrics, allocation, checked)

        checked = export(model, job.loaded.tokenizer, folder, card, Wanted(job.export_dtype, sample, job.loaded.folder))
    if metrics is not None:
        of_export = {"dtype": facts.dtype, "check": None if checked is None else asdict(checked)}
        job.directory.write("metrics.json", metrics | {"stages": job.directory.costs(), "export": of_export})


def _sample(job: Job, supernet: Supernet) -> Sample:
    """A few held-out sequences with the losses that the search's way of measuring gives for a last rebuild."""
    text = job.tokens["evaluation"]
    ids = text.ids[:SEQUENCES]
    model, resources = job.model_on_device(), job.resources
    with closing(GenerationEvaluator(model, supernet, ids, CrossEntropy(), resources, text.unscored)) as evaluate:
        losses = evaluate([_sparsest(supernet)], np.arange(len(ids)))[0]
    return Sample(ids, text.unscored, tuple(map(float, losses)), job.export_dtype)


def _facts(job: Job, trust: bool) -> Facts:
    """What the card says of the run."""
    return Facts(
        name=job.loaded.name,
        pruner=job.pruner.name,
        strategy=job.strategy.name,
        rule=job.strategy.is_rule,
        fitness=type(job.fitness).__name__,
        dtype=str(job.export_dtype).removeprefix("torch."),
        trust=trust,
        source=job.loaded.folder,
    )


def warn_if_worse(metrics: Mapping[str, Any], rule: bool) -> None:
    """Tell the user where the allocation found, by a rule or a search, is worse than the uniform one, by more than
    chance.

    That is by more than the standard error of the difference on the same sequences; one sequence proves nothing.
    """
    searched, even = (metrics[name]["kl_divergence"] for name in ("searched", "uniform"))
    gap = metrics["searched_minus_uniform"]
    error = gap["kl_divergence_error"]
    lost = math.isfinite(even) and not math.isfinite(searched)
    if lost or (error is not None and gap["kl_divergence"] > error):
        longer = "search longer (strategy.generations), or on more text (data.sequences.search)"
        advice = "use another strategy, such as guided" if rule else longer
        log.warning(
            "the model found is further from the dense one than the uniform one (KL %g and %g): %s",
            searched,
            even,
            advice,
        )


def _summarise(job: Job) -> None:
    """The table at the end."""
    metrics = job.directory.read("metrics.json")
    if metrics is not None:
        log.info("on %s held-out tokens:\n%s", f"{metrics['evaluation_tokens']:,}", metrics_table(metrics))
        if job.fitness.is_divergence:
            warn_if_worse(metrics, job.strategy.is_rule)
    seconds = {name: cost["seconds"] for name, cost in job.directory.costs().items()}
    peak = max((cost["peak_memory_bytes"] for cost in job.directory.costs().values()), default=0)
    log.info(
        "%s; peak memory %.2f GB", ", ".join(f"{name} {clock(value)}" for name, value in seconds.items()), peak / 1e9
    )
    log.info("results are in %s", job.directory.path)
