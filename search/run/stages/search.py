"""The stage `search`: the rounds, from coarse to fine, each among the candidates of its own supernet."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, ClassVar

import numpy as np

from search.evaluation.generation import GenerationEvaluator
from search.report.table import allocation_json
from search.run.progress import track
from search.run.rounds import Found, Round
from search.run.shared import Run
from search.strategies.base import Problem, Unmeasurable
from search.strategies.rules.front import front_json
from search.strategies.state import State
from supernet.errors import InputError
from supernet.store import Supernet

log = logging.getLogger(__name__)


class Search:
    """Searches all rounds and writes `allocation.json`, and `front.json` where a front was found."""

    name: ClassVar[str] = "search"
    needs: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ("allocation.json", "front.json")

    def done(self, run: Run) -> bool:
        """Whether all rounds are searched, and the files say what was found."""
        searched = run.rounds.searched()
        if run.rounds.following(searched) is not None:
            return False
        files = results(run, run.rounds.found(searched))
        return all(_is_there(run, name, content) for name, content in files.items())

    def run(self, run: Run) -> None:
        """Go on where the last generation ended."""
        while (following := run.rounds.following(run.rounds.searched())) is not None:
            supernet = None
            if run.components.strategy.needs_candidates:
                title = f"{following.title}: build"
                supernet = run.supernets.around(following.window, following.start, title, "build" in run.stages)
            with _problem(run, following, supernet) as problem:
                _search(run, following, problem)
        found = run.rounds.found(run.rounds.searched())
        for name, content in results(run, found).items():
            run.directory.write(name, content)
        if not any(found.kept.values()):
            log.warning("nothing is kept of any unit: no level between that and more fits the budget; ask for less")


def results(run: Run, found: Found) -> dict[str, dict[str, Any]]:
    """The files of the result, by name."""
    model = run.inputs.identity["model"]
    files = {"allocation.json": allocation_json(found.space, found.allocation, found.budget, model)}
    if found.front is not None:
        dense = 0.0 if run.components.fitness.is_divergence else None
        files["front.json"] = front_json(found.space, found.front, found.budget, model, dense)
    return files


def _is_there(run: Run, name: str, content: Mapping[str, Any]) -> bool:
    """Whether a file says this; one that is damaged does not, and is written anew."""
    try:
        there = run.directory.read(name)
    except InputError:
        return False
    return json.dumps(there, sort_keys=True) == json.dumps(content, sort_keys=True)


@contextmanager
def _problem(run: Run, one: Round, supernet: Supernet | None) -> Iterator[Problem]:
    """What the strategy is to solve in a round; without a supernet nothing can be measured."""
    inputs = run.inputs
    if supernet is None:
        yield Problem(one.space, one.budget, one.start, Unmeasurable(), inputs.dense)
        return
    model, text = inputs.loaded.model, inputs.tokens["search"]
    given = model, supernet, text.ids, run.components.fitness, inputs.resources, text.unscored
    with closing(GenerationEvaluator(*given)) as evaluator:
        yield Problem(one.space, one.budget, one.start, evaluator, inputs.dense, supernet.errors, supernet)


def _search(run: Run, one: Round, problem: Problem) -> None:
    """Generations from the last checkpoint, if there is one, to the end."""
    strategy = run.components.strategy
    seed = int(np.random.SeedSequence([int(run.config.seed), one.index]).generate_state(1)[0])
    state: State = run.rounds.state(one) or strategy.begin(problem, seed)
    if run.rounds.is_over(state):  # a search of no generations: its start is what it finds
        run.directory.save_state(one.index, one.space, state, [])
    for _ in track(range(state.generation, strategy.generations), f"{one.title}: search", state.generation):
        with run.directory.stage("search"):
            state, rows = strategy.advance(problem, state)
            run.directory.save_state(one.index, one.space, state, rows)
            run.follow(one)
        if state.exhausted:
            log.info("%s: nothing is left to try; the search ends early", one.title)
            break
