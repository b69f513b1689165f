"""What the stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from search.budgets.budget import Budget
from search.budgets.from_settings import make_budget
from search.export.rounding import rounded
from search.run.components import Components
from search.run.directory import RunDirectory
from search.run.inputs import Inputs
from search.run.latencies import Latencies
from search.run.ranks import Ranks
from search.run.rounds import Round, Rounds
from search.run.supernets import Supernets
from supernet.models.assemble import assemble
from supernet.space import Allocation, Space
from supernet.store import Supernet


@dataclass(frozen=True)
class Run:
    """One run: its settings and directory, and what follows from them.

    Attributes:
        config: As it was composed.
        stages: Names of those that were asked for.
        directory: Where it keeps what is done.
        components: What the configuration chooses.
        inputs: Model, text and device.
        latencies: How long the model takes, where the budget needs that.
        supernets: Opens and builds them.
        rounds: Of build and search.
        budget: What an allocation of a space may cost; latencies that are not known yet are measured.
    """

    config: DictConfig
    stages: tuple[str, ...]
    directory: RunDirectory
    components: Components
    inputs: Inputs
    latencies: Latencies
    supernets: Supernets
    rounds: Rounds
    budget: Callable[[Space], Budget]

    @classmethod
    def opened(cls, config: DictConfig, stages: tuple[str, ...], directory: RunDirectory) -> Run:
        """Check all settings and take what follows from them. Neither model nor text is loaded yet.

        Raises:
            InputError: A setting is wrong.
        """
        components = Components.validated(config)
        inputs = Inputs(config, components.pruner, Ranks.of_environment(), directory.path)
        latencies = Latencies(config.budget, inputs, directory, keep=not config.dry_run)
        supernets = Supernets(config.supernet.root, components, inputs, directory)

        def budget(space: Space) -> Budget:
            dtype = components.exporter.dtype_of(inputs.loaded)
            return make_budget(config.budget, inputs.loaded.model, space, latencies.costs, dtype)

        rounds = Rounds(int(config.rounds), components, inputs, directory, budget)
        return cls(config, stages, directory, components, inputs, latencies, supernets, rounds, budget)

    @property
    def export_dtype(self) -> torch.dtype:
        """Of the weights in the exported file: what is measured is rounded to it."""
        return self.components.exporter.dtype_of(self.inputs.loaded)

    def follow(self, one: Round) -> None:
        """Tell the trackers what the history has of a round."""
        for tracker in self.components.trackers:
            tracker.generation(self.directory.history(), one.index, one.space)

    def assembled(self, supernet: Supernet) -> PreTrainedModel:
        """The model of a last rebuild, with weights that the exported file can hold."""
        return rounded(assemble(self.inputs.model_on_device(), supernet, sparsest(supernet)), self.export_dtype)


def sparsest(supernet: Supernet) -> Allocation:
    """What a last rebuild is of: its only level besides the dense one, where there is one."""
    return tuple(len(unit.levels) - 1 for unit in supernet.space.units)
