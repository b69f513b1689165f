"""The seam between a run and the tools that people watch runs with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from supernet.space import Space


class Tracker(Protocol):
    """Shows a run in another tool: a copy of what the run's directory has, which nothing in the run depends on.

    Each entry of `tracker` in the configuration is one; its settings are checked when it is made. A run calls `begin`,
    then `generation` and `metrics` as they come, and `end`. A search does not end because its tracker cannot write:
    after `begin` that is a warning, and the next call tries again.
    """

    def begin(self, folder: Path, identifier: str) -> None:
        """Called once, before anything is built, also where a run goes on.

        Args:
            folder: The run's directory; its name is the run's.
            identifier: Tells the run from others of the same name; the same whenever it goes on.

        Raises:
            InputError: The tool cannot be used as the settings say.
        """
        ...

    def generation(self, history: pd.DataFrame, round_index: int, space: Space) -> None:
        """Called after each generation, and at the beginning for each round that was searched before.

        Args:
            history: All rows of the run so far, as `history.parquet` has them. Which of them are known already is the
                tracker's to find out: a killed run may have written some that it did not show, and a run may be given
                a tracker when it has finished.
            round_index: Of the last rows to show; those of later rounds come with their own call.
            space: The units and levels of that round.
        """
        ...

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Called with the content of `metrics.json` when the stages are done, if there is one; perhaps once more."""
        ...

    def end(self) -> None:
        """Called when all stages that were asked for are done; not where an error or a kill ended the run."""
        ...
