"""What `dry_run=true` prints: the space, the budget, and what the run would cost."""

from __future__ import annotations

import logging

from search.budgets.knapsack import uniform
from search.run.levels import exact, mixture
from search.run.shared import Run
from supernet.space import Allocation

log = logging.getLogger(__name__)


def describe(run: Run) -> None:
    """Print it. Nothing is built, searched or written by the model; only what is loaded may be kept in the cache."""
    space = run.rounds.first_window.space
    levels = sum(len(unit.levels) for unit in space.units)
    log.info("%s: %d units, %d levels", run.inputs.loaded.name, len(space.units), levels)
    around: Allocation = (0,) * len(space.units)
    if unmeasured := run.latencies.unmeasured(space):
        told = "budget: not known before the latencies of %d models have been measured beside the dense one"
        log.info(told, len(unmeasured))
    else:
        budget = run.budget(space)
        log.info("budget: %s", budget)
        run.components.strategy.check_budget(space, budget)
        around = uniform(space, budget)
    _describe_build(run, around)
    _describe_search(run)


def _describe_build(run: Run, around: Allocation) -> None:
    window, accumulation, rounds = run.rounds.first_window, run.components.accumulation, run.rounds.count
    if run.components.strategy.needs_candidates:
        weights = mixture(window, accumulation, around)
        log.info("build: %s", run.supernets.estimate(window.space, weights))
        each = f"that is for each of {rounds} rounds; " if rounds > 1 else ""
        log.info("%sthe last rebuilds of 2 allocations take the same passes and fewer levels", each)
    else:
        space, weights = exact(run.inputs.prunables, window.space.kept(around), accumulation)
        cost = run.supernets.estimate(space, weights)
        log.info("build: nothing but the last rebuilds of 2 allocations, for each of them %s", cost)


def _describe_search(run: Run) -> None:
    strategy, rounds = run.components.strategy, run.rounds.count
    if not strategy.tokens_per_generation:
        each = f"in each of {rounds} rounds " if rounds > 1 else ""
        log.info("search: no allocation is measured; %sthe rule looks at %s", each, strategy.looks_at)
        return
    tokens = rounds * strategy.generations * strategy.tokens_per_generation
    log.info("search: about %s forward tokens, fewer where it ends early or the search text is short", f"{tokens:,}")
    most = run.inputs.resources.total_bytes() / 1e9
    log.info("search: up to %.1f GB besides the model (evaluator.memory and evaluator.cache set other limits)", most)
