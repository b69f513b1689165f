"""The stage `build`: the candidates of the next round, in a supernet."""

from __future__ import annotations

import logging
from typing import ClassVar

from search.run.shared import Run

log = logging.getLogger(__name__)


class Build:
    """Builds the supernet of the first round that is not searched yet.

    Later rounds follow from what the search finds: theirs are built by the stage `search`, if `build` is asked for too.
    """

    name: ClassVar[str] = "build"
    needs: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()

    def done(self, run: Run) -> bool:
        """Whether that supernet is finished, or none is needed any more."""
        following = run.rounds.following(run.rounds.searched())
        if following is None or not run.components.strategy.needs_candidates:
            return True
        return run.supernets.has_round(following.window, following.start)

    def run(self, run: Run) -> None:
        """Find the supernet on disk, or build it."""
        following = run.rounds.following(run.rounds.searched())
        assert following is not None
        supernet = run.supernets.around(following.window, following.start, f"{following.title}: build", may_build=True)
        if "search" not in run.stages:
            log.info("%s: the supernet is %s", following.title, supernet.path)
