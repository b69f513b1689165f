"""A run from its settings to its results: the stages that were asked for, in order, over one directory.

Everything is resumable: each stage first looks for its result in the run's directory or in the supernet folder.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from search.report.closing import NEXT, reading, tasted
from search.report.table import metrics_table
from search.report.warnings import warn_if_worse
from search.run.directory import RunDirectory, locked
from search.run.dry_run import describe
from search.run.progress import clock
from search.run.settings import check_settings, settings_record, without_effect
from search.run.shared import Run
from search.run.stages import STAGES
from search.run.stages.evaluate import METRICS
from supernet.errors import InputError
from supernet.system.memory import keep_freed_memory

log = logging.getLogger(__name__)


def run(config: DictConfig, path: Path, typed: Collection[str] = ()) -> None:
    """One run.

    Args:
        config: Composed by Hydra.
        path: The run's directory.
        typed: The settings that the user gave in the command.

    Raises:
        InputError: What the user gave is wrong, or the system refuses.
    """
    check_settings(config)
    for line in without_effect(config, typed):
        log.warning("%s", line)
    stages, record = _chosen(config), settings_record(config)
    results = [name for stage in STAGES for name in stage.files]
    if config.dry_run:
        planned = Run.opened(config, stages, RunDirectory(path, record, fresh=False))
        _check_inputs(planned, typed)
        describe(planned)
        return
    keep_freed_memory()
    with locked(path, results):  # first: fresh=true must not move a run that is at work
        begun = Run.opened(config, stages, RunDirectory(path, record, bool(config.fresh), results))
        _check_inputs(begun, typed)
        begun.directory.identify(begun.inputs.identity)
        _begin_trackers(begun)
        _go_through(begun)
        begun.directory.finish()


def _chosen(config: DictConfig) -> tuple[str, ...]:
    """The names in `stages=`, checked."""
    known, stages = [stage.name for stage in STAGES], config.stages
    if not isinstance(stages, ListConfig) or not stages or not set(stages) <= set(known):
        raise InputError(f"stages={stages} must be a list of some of {', '.join(known)}, such as stages=[build,search]")
    return tuple(stages)


def _check_inputs(run: Run, typed: Collection[str]) -> None:
    """Check units and text for what the method and the strategy can do: not after hours of building.

    Raises:
        InputError: The units cannot be pruned so, or the strategy has nothing to say about them.
    """
    if run.inputs.has_fixed_levels:
        for key in sorted({"supernet.levels", "supernet.step", "supernet.lowest"} & set(typed)):
            log.warning("%s has no effect: the levels of this kind of pruning are fixed", key)
    strategy = run.components.strategy
    strategy.check_units(run.inputs.loaded.model, run.rounds.first_window.space)
    if (warning := strategy.pool_warning(*run.inputs.tokens["search"].ids.shape)) is not None:
        log.warning("%s", warning)


def _begin_trackers(run: Run) -> None:
    """Begin, and show what the run did before."""
    for tracker in run.components.trackers:
        tracker.begin(run.directory.path, run.directory.identifier())
    if run.components.trackers:
        for one, _ in run.rounds.searched():
            run.follow(one)


def _go_through(run: Run) -> None:
    """Do the stages that were asked for and are not done yet."""
    asked = [stage for stage in STAGES if stage.name in run.stages]
    needed = {name for stage in asked for name in stage.needs} - set(run.stages)
    for stage in STAGES:
        if stage.name in needed and not stage.done(run):
            raise InputError(
                f"{run.directory.path} has no result of {stage.name} yet; add {stage.name} to "
                f"stages=[{','.join(run.stages)}]"
            )
    for stage in asked:
        if stage.done(run):
            log.info("%s: nothing is left to do", stage.name)
        else:
            stage.run(run)
    if run.rounds.following(run.rounds.searched()) is None:
        _summarise(run)
    for tracker in run.components.trackers:
        tracker.end()


def _summarise(run: Run) -> None:
    """The table at the end."""
    metrics, costs = run.directory.read(METRICS), run.directory.costs()
    if metrics is not None:
        log.info("on %s held-out tokens:\n%s", f"{metrics['evaluation_tokens']:,}", metrics_table(metrics))
        log.info("%s", reading(metrics))
        if run.components.fitness.is_divergence:
            warn_if_worse(metrics, run.components.strategy.is_rule)
        if len(metrics.get("continuations", {})) > 1:  # more than the prompt
            log.info("%s", tasted(metrics["continuations"]))
        for tracker in run.components.trackers:
            tracker.metrics(metrics)
    seconds = ", ".join(f"{name} {clock(cost['seconds'])}" for name, cost in costs.items())
    peak = max((cost["peak_memory_bytes"] for cost in costs.values()), default=0)
    log.info("%s; peak memory %.2f GB", seconds, peak / 1e9)
    log.info("results are in %s", run.directory.path)
    if metrics is not None:
        log.info("%s", NEXT)
