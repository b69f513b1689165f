"""What `dry_run=true` prints: the space, the budget, and what the run would cost."""

from __future__ import annotations

import logging

from local_prune.estimate import estimate
from search.budget import uniform
from search.job import Job
from search.levels import mixture

log = logging.getLogger(__name__)


def describe(job: Job) -> None:
    """Print it. Nothing is written but the cache of the model."""
    window = job.grid.first(job.prunables)
    space, budget = window.space, job.budget(window.space)
    rounds, strategy = int(job.config.rounds), job.strategy
    log.info("%s: %d units, %d levels", job.loaded.name, len(space.units), sum(len(unit.levels) for unit in space.units))
    log.info("budget: %s", budget)
    weights = mixture(window, job.accumulation, uniform(space, budget))
    cost = estimate(job.loaded.model, job.calibration, job.pruner, space, weights, job.device)
    log.info("build: %s", cost)
    log.info("that is for each of %d rounds; the last rebuilds of 2 allocations take the same passes and fewer levels", rounds)
    log.info("search: about %s forward tokens", f"{rounds * strategy.generations * strategy.tokens_per_generation:,}")
