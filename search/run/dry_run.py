"""What `dry_run=true` prints: the space, the budget, and what the run would cost."""

from __future__ import annotations

import logging

from local_prune.estimate import estimate
from search.budgets.knapsack import uniform
from search.run.job import Job
from search.run.levels import exact, mixture
from supernet.space import Allocation

log = logging.getLogger(__name__)


def describe(job: Job) -> None:
    """Print it. Nothing is written but the cache of the model."""
    window = job.first_window
    space, unmeasured = window.space, job.unmeasured(window.space)
    rounds, strategy = job.rounds, job.strategy
    log.info(
        "%s: %d units, %d levels", job.loaded.name, len(space.units), sum(len(unit.levels) for unit in space.units)
    )
    around: Allocation = (0,) * len(space.units)
    if unmeasured:
        log.info(
            "budget: not known before the latencies of %d models have been measured beside the dense one",
            len(unmeasured),
        )
    else:
        budget = job.budget(space)
        log.info("budget: %s", budget)
        strategy.check_budget(space, budget)
        around = uniform(space, budget)
    given = job.loaded.model, job.calibration, job.pruner
    if strategy.needs_candidates:
        weights = mixture(window, job.accumulation, around)
        log.info("build: %s", estimate(*given, space, weights, job.device, job.dense_stream))
        each = f"that is for each of {rounds} rounds; " if rounds > 1 else ""
        log.info("%sthe last rebuilds of 2 allocations take the same passes and fewer levels", each)
    else:
        last, weights = exact(job.prunables, space.kept(around), job.accumulation)
        cost = estimate(*given, last, weights, job.device, job.dense_stream)
        log.info("build: nothing but the last rebuilds of 2 allocations, for each of them %s", cost)
    if not strategy.tokens_per_generation:
        each = f"in each of {rounds} rounds " if rounds > 1 else ""
        log.info("search: no allocation is measured; %sthe rule looks at %s", each, strategy.looks_at)
    else:
        tokens = rounds * strategy.generations * strategy.tokens_per_generation
        log.info(
            "search: about %s forward tokens, fewer where it ends early or the search text is short", f"{tokens:,}"
        )
