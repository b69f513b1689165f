"""What the configuration chooses for a run: the local pruner, the strategy, the loss, the levels, the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from local_prune.pruner import Pruner
from search.evaluation.fitness import Fitness
from search.export.base import Exporter
from search.run.levels import Grid, check_accumulation
from search.run.settings import check_types
from search.strategies.base import Strategy
from search.trackers.base import Tracker


@dataclass(frozen=True)
class Components:
    """All that is made by a `_target_`, but for the model and the text, which take long to load.

    Attributes:
        pruner: Makes the candidates.
        strategy: Finds the allocation.
        fitness: The loss that a search minimises.
        grid: The levels of all rounds.
        accumulation: What the next sub-block sees while candidates are built; methods that look at no inputs have no
            such setting, and "none" then.
        exporter: Writes the pruned model.
        trackers: Follow the run.
    """

    pruner: Pruner
    strategy: Strategy[Any]
    fitness: Fitness
    grid: Grid
    accumulation: str
    exporter: Exporter
    trackers: Sequence[Tracker]

    @classmethod
    def validated(cls, config: DictConfig) -> Components:
        """Make them all at once: a mistake in the settings of one should not wait for hours of building.

        Raises:
            InputError: A setting is wrong; hydra's exceptions, which `search.errors` explains, where it is unknown.
        """
        strategy: Strategy[Any] = instantiate(config.strategy)
        strategy.check_rounds(int(config.rounds))
        accumulation = str(config.prune.get("accumulation", "none"))
        check_accumulation(accumulation)
        for key in ("prune.pruner", "fitness"):
            check_types(config, key)
        levels = config.supernet
        trackers: dict[str, Any] = config.get("tracker") or {}
        return cls(
            pruner=instantiate(config.prune.pruner),
            strategy=strategy,
            fitness=instantiate(config.fitness),
            grid=Grid(int(levels.levels), float(levels.step), float(levels.lowest)),
            accumulation=accumulation,
            exporter=instantiate(config.export),
            trackers=[instantiate(one) for one in trackers.values()],
        )
