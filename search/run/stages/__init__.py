"""The stages of a run, a file each, in the order in which they follow each other.

A new stage is one file here and one entry in `STAGES`; `stages=` in the configuration names those that are to be done.
May import all of `search` but `search.cli`; `search.run.pipeline` imports it.
"""

from search.run.stages.base import Stage
from search.run.stages.build import Build
from search.run.stages.evaluate import Evaluate
from search.run.stages.export import Export
from search.run.stages.search import Search

STAGES: tuple[Stage, ...] = (Build(), Search(), Evaluate(), Export())

__all__ = ["STAGES", "Stage"]
