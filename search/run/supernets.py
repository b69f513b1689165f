"""The supernets of a run: described by what their candidates depend on, found on disk, continued, or built."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_prune.estimate import Estimate, estimate
from local_prune.identity import build_record, reads_text
from local_prune.walk import build
from search.paths import cache_dir
from search.run.components import Components
from search.run.directory import RunDirectory
from search.run.inputs import Inputs
from search.run.levels import Mixture, Window, exact, mixture
from search.run.progress import track
from supernet.errors import InputError
from supernet.space import Allocation, Space
from supernet.store import Supernet

log = logging.getLogger(__name__)


class Supernets:
    """Opens and builds the supernets that a run needs, and notes in its directory which ones it uses."""

    def __init__(self, root: str | None, components: Components, inputs: Inputs, directory: RunDirectory) -> None:
        """Take what candidates depend on. Nothing is opened yet.

        Args:
            root: The folder of all supernets; None for the one in the cache.
            components: The pruner, and what it sees.
            inputs: The model and the calibration text.
            directory: Of the run.
        """
        self._folder = Path(root).expanduser() if root else cache_dir() / "supernets"
        self._components, self._inputs, self._directory = components, inputs, directory

    def has_round(self, window: Window, around: Allocation) -> bool:
        """Whether the supernet of a round is finished, and noted as this run's; nothing is built or noted."""
        supernet = self._opened(window.space, mixture(window, self._components.accumulation, around))
        return supernet.complete and self._directory.uses(supernet.fingerprint)

    def around(self, window: Window, around: Allocation, title: str, may_build: bool) -> Supernet:
        """The finished supernet of a round: its window of levels, and the allocation known before it."""
        return self._finished(window.space, mixture(window, self._components.accumulation, around), title, may_build)

    def rebuilt(self, kept: Mapping[str, int], title: str) -> Supernet:
        """The candidates of one allocation, built once more along it with exact error accumulation."""
        space, weights = exact(self._inputs.prunables, kept, self._components.accumulation)
        return self._finished(space, weights, f"{title} model: last rebuild", may_build=True)

    def estimate(self, space: Space, weights: Mixture) -> Estimate:
        """What a build would take, from a probe of the first block."""
        inputs = self._inputs
        given = inputs.loaded.model, inputs.calibration, self._components.pruner
        return estimate(*given, space, weights, inputs.device, inputs.dense_stream)

    def _finished(self, space: Space, weights: Mixture, title: str, may_build: bool) -> Supernet:
        """The supernet of a space: found, continued, or built; InputError where it would have to be and may not."""
        supernet = self._opened(space, weights)
        if supernet.complete or may_build:
            supernet.note_use(self._directory.note_supernet(supernet.fingerprint, supernet.path))
            supernet.refresh()  # until it was noted, another process may have removed what no run referred to
        if supernet.complete:
            log.info("%s: found in %s", title, supernet.path)
        elif not may_build:
            raise InputError(f"{title}: there is no finished supernet in {supernet.path}; add build to stages")
        else:
            self._build(supernet, weights, title)
        return supernet

    def _opened(self, space: Space, weights: Mixture) -> Supernet:
        """The one on disk, whole or begun, or a new empty one that is not on disk yet."""
        labels = {"model": self._inputs.loaded.name, "method": self._components.pruner.name}
        return Supernet.open_or_create(self._folder, space, self._description(space, weights), labels)

    def _description(self, space: Space, weights: Mixture) -> dict[str, Any]:
        """All that the candidates depend on."""
        inputs = self._inputs
        given = inputs.loaded.model, inputs.calibration, self._components.pruner
        return {
            "model": inputs.loaded.fingerprint,
            "dtype": inputs.dtype,
            "data": inputs.tokens["calibration"].fingerprint if reads_text(*given) else None,
            "build": build_record(*given, space, weights, inputs.device),
        }

    def _build(self, supernet: Supernet, weights: Mixture, title: str) -> None:
        inputs = self._inputs
        model = inputs.loaded.model
        model.cpu()  # also where a search had it on the device: a resumed run finds it here, and must round alike
        log.info("%s: %s", title, self.estimate(supernet.space, weights))
        given = model, inputs.calibration, self._components.pruner, supernet, weights, inputs.device
        with self._directory.stage("build"):
            build(*given, track, title, inputs.scores, inputs.dense_stream)
