"""The seam between a run and its stages."""

from __future__ import annotations

from typing import ClassVar, Protocol

from search.run.shared import Run


class Stage(Protocol):
    """One step of a run, which leaves its result in the run's directory (or, for candidates, in a supernet).

    The stages that `stages=` names are gone through in the order of `search.run.stages.STAGES`. Before the first of
    them begins, `done` is asked of every stage in `needs` that was not named; then, for each one named, `done` is
    asked, and `run` called where it says no. Directory, model and text are there, and the settings are checked.

    Attributes:
        name: As `stages=` has it.
        needs: The names of the stages whose results it works on.
        files: What it leaves in the run's directory beside the checkpoint: fresh=true moves it aside.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    files: ClassVar[tuple[str, ...]]

    def done(self, run: Run) -> bool:
        """Whether the result is there, whole. This neither builds nor writes anything.

        Raises:
            InputError: A file of the result is damaged, and cannot be made again without losing more.
        """
        ...

    def run(self, run: Run) -> None:
        """Make the result, so that `done` says yes from then on.

        A process that is killed in here is followed by another that asks `done`, hears no, and calls this again: what
        was half done goes on, or is swept away.
        """
        ...
