"""Searches with Optuna's samplers (TPE, CMA-ES, NSGA-II), on a few numbers instead of a level for every unit.

The samplers know boxes, not budgets, and are slow with hundreds of parameters. So a trial is a curve over depth for
each kind of unit. It says what is added to the start's sparsities, at a few knots with half a cosine from each to the
next. The curves are shifted until they cost as much as the start, rounded to levels so that errors even out over depth,
and moved to the nearest allocation that meets the budget. The state holds all trials, from which every generation makes
the study anew.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.budgets.knapsack import knapsack, relaxed
from search.strategies.base import HistoryRow, Problem, StrategyDefaults
from search.strategies.checks import check_whole
from search.strategies.measuring import Measured, sequences_for
from search.strategies.state import State, read_allocation, read_count, read_number, rng_state
from supernet.errors import InputError
from supernet.space import BITS, WEIGHTS, Allocation, Unit

SAMPLERS = ("tpe", "cmaes", "nsga2")
SMALLEST = {"tpe": 1, "cmaes": 4, "nsga2": 2}  # how few trials a generation may have
BATCHES = 20  # batches of trials in a row without a new allocation, after which nothing is left to try
HALVINGS = 60  # how often the interval that holds the curves' shift is halved
CMA_GENERATION, CMA_OPTIMIZER = "cma:generation", "cma:optimizer"  # what CmaEsSampler keeps in a trial
# The names under which samplers note what a checkpoint may hold: the generation of a trial, and the trials that are
# the parents of a generation.
GENERATION, PARENTS = re.compile(r"\w+:generation"), re.compile(r"\w+:(parent|population)(:\w+)*")


@dataclass(frozen=True)
class Trial:
    """A trial of the study.

    Attributes:
        params: The value of the curves at each knot.
        allocation: The allocation that the curves through these knots stand for.
        attrs: What the sampler notes of the trial.
        value: The loss of the allocation; infinite if that is not a number.
    """

    params: tuple[float, ...]
    allocation: Allocation
    attrs: dict[str, Any]
    value: float

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Trial:
        """Return the trial that a state wrote, without attributes that a sampler never notes."""
        return Trial(
            tuple(map(read_number, content["params"])),
            read_allocation(content["allocation"]),
            of_trial(content["attrs"]),
            read_number(content["value"]),
        )


@dataclass(frozen=True)
class StudyState(State):
    """What the search remembers of the study, so that every generation can make it anew.

    Attributes:
        seed: The seed from which each generation's sampler gets its own.
        sequences: Which sequences of the search text all trials are measured on.
        trials: All trials so far; the first one is the start.
        study: What the sampler notes of the study.
    """

    seed: int = 0
    sequences: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()
    study: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def values_of(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields that hold the study."""
        return super().values_of(content) | {
            "seed": read_count(content["seed"]),
            "sequences": tuple(map(read_count, content["sequences"])),
            "trials": tuple(map(Trial.from_json, content["trials"])),
            "study": of_study(content["study"]),
        }

    def allocations(self) -> list[Allocation]:
        """Add the allocations of the trials."""
        return [self.parent, *(trial.allocation for trial in self.trials)]


@dataclass(frozen=True)
class OptunaStudy(StrategyDefaults):
    """Settings of the search with Optuna.

    Attributes:
        generations: How many generations a round has.
        offspring: How many trials a generation has, which is the population of CMA-ES and NSGA-II.
        tokens: How many tokens an allocation is measured on. They are the same ones during the whole search, so that
            values can be compared.
        sampler: tpe (Bergstra et al. 2011), cmaes (Hansen 2016) or nsga2 (Deb et al. 2002, with a single objective).
        knots: How many knots the curve of each kind of unit has.
        spread: How much a curve adds to the start's sparsities, or takes off, at most, before the shift to the budget.
    """

    name: ClassVar[str] = "optuna"
    state_class: ClassVar[type[State]] = StudyState

    generations: int
    offspring: int
    tokens: int
    sampler: str = "tpe"
    knots: int = 4
    spread: float = 0.25

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InputError(f"strategy.sampler={self.sampler} must be one of {', '.join(SAMPLERS)}")
        for name, least in {"generations": 0, "offspring": SMALLEST[self.sampler], "tokens": 1, "knots": 1}.items():
            check_whole(name, getattr(self, name), least)
        if type(self.spread) not in (int, float) or not 0.0 < self.spread <= 1.0:
            raise InputError(
                f"strategy.spread={self.spread} must be a number above 0, and at most 1; 0.25 is a good start"
            )

    @property
    def tokens_per_generation(self) -> int:
        """Count one measurement of each trial."""
        return self.offspring * self.tokens

    def begin(self, problem: Problem, seed: int) -> StudyState:
        """Return a state at the start, with the sequences drawn that all trials are measured on."""
        state = StudyState.first(problem.start, seed)
        rng = state.generator()
        sequences = rng.permutation(problem.evaluate.sequences)[: sequences_for(self.tokens, problem)]
        return replace(state, rng=rng_state(rng), seed=seed, sequences=tuple(sequences.tolist()))

    def advance(self, problem: Problem, state: StudyState) -> tuple[StudyState, list[HistoryRow]]:
        """Ask the sampler for a generation of trials, measure the new ones, and remember their values for it."""
        curves = Curves.of(problem, self.knots)
        if len(curves.names) < 2:  # a single number shifts all units alike, and is shifted back
            return replace(state, exhausted=True), []
        # The start's value is not known before the first generation; nothing is compared with it until then.
        trials = state.trials or (Trial((0.0,) * len(curves.names), problem.start, {}, 0.0),)
        values = {trial.allocation: trial.value for trial in trials}
        proposed, noted = self._propose(curves, state, trials)
        new = [one for one in dict.fromkeys(trial.allocation for trial in proposed) if one not in values]
        if not new:
            return replace(state, exhausted=True), []

        begun, measured = time.perf_counter(), Measured(problem, state.generation)
        before = [] if state.fitness is None else [state.fitness]
        fresh = new if before else [state.parent, *new]
        found = measured.losses(fresh, state.sequences).mean(1).tolist()
        fitness = np.array([*before, *found])
        best = int(np.argsort(fitness, kind="stable")[0])  # the parent first: it wins a tie
        measured.note([state.parent, *new], fitness, len(state.sequences), {best}, time.perf_counter() - begun)

        values |= {allocation: _told(value) for allocation, value in zip(fresh, found, strict=True)}
        return replace(
            state,
            parent=[state.parent, *new][best],
            fitness=float(fitness[best]),
            generation=state.generation + 1,
            tokens=state.tokens + measured.tokens,
            trials=tuple(replace(trial, value=values[trial.allocation]) for trial in (*trials, *proposed)),
            study=noted,
        ), measured.rows

    def _propose(
        self, curves: Curves, state: StudyState, trials: Sequence[Trial]
    ) -> tuple[list[Trial], dict[str, Any]]:
        """Ask for batches of trials until one has a new allocation, or there have been too many.

        Returns:
            The trials of the last batch, whose values are not known yet, and what the sampler notes in the study.
        """
        known = {trial.allocation for trial in trials}
        seed = int(np.random.SeedSequence([state.seed, state.generation]).generate_state(1)[0])
        distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(-float(self.spread), float(self.spread)) for name in curves.names
        }
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise there is a line for every study and trial
        try:
            storage = InMemoryStorage()
            study = _rebuilt(storage, self._sampler(seed), distributions, trials, state.study)
            if self.sampler == "nsga2" and not state.trials:  # its first population should have the start
                study.enqueue_trial(dict.fromkeys(curves.names, 0.0))
            proposed: list[Trial] = []
            for _ in range(BATCHES):
                asked = [study.ask(distributions) for _ in range(self.offspring)]
                frozen = study.get_trials(deepcopy=False)
                proposed = [self._trial(curves, frozen[trial.number]) for trial in asked]
                if any(trial.allocation not in known for trial in proposed):
                    break
                for trial in asked:  # if old values were told again, CMA-ES would drift away
                    study.tell(trial, state=TrialState.FAIL)
        finally:
            optuna.logging.set_verbosity(verbosity)
        # NSGA-II notes in the study which trials are the parents of each generation, by their numbers.
        noted = storage.get_study_system_attrs(storage.get_study_id_from_name(study.study_name))
        return proposed, of_study(json.loads(json.dumps(noted)))

    def _trial(self, curves: Curves, trial: FrozenTrial) -> Trial:
        """Return a trial that the sampler was asked for; its value is not known yet."""
        params = tuple(float(trial.params[name]) for name in curves.names)
        # This keeps the sampler's generation but not the optimizer of CMA-ES, which is a pickle (`_rebuilt` says more).
        attrs = of_trial(trial.system_attrs)
        return Trial(params, curves.allocation(np.array(params)), attrs, float("nan"))

    def _sampler(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # before Optuna 5 two of TPE's options, now its defaults, were experimental
            if self.sampler == "tpe":
                return TPESampler(seed=seed, multivariate=True, constant_liar=True)
            if self.sampler == "cmaes":
                return CmaEsSampler(seed=seed, popsize=self.offspring)
            return NSGAIISampler(seed=seed, population_size=self.offspring)


def of_trial(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those attributes of a trial that a checkpoint may hold: the sampler's generation, a whole number.

    Optuna unpickles what CMA-ES keeps in other attributes, so whoever can write a checkpoint could run code that way.
    """
    return {key: value for key, value in attrs.items() if GENERATION.fullmatch(key) and type(value) is int}


def of_study(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those attributes of a study that a checkpoint may hold: the numbers of trials."""
    return {key: value for key, value in attrs.items() if PARENTS.fullmatch(key) and _are_numbers(value)}


def _are_numbers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(map(_are_numbers, value)))


def _rebuilt(
    storage: InMemoryStorage,
    sampler: BaseSampler,
    distributions: dict[str, BaseDistribution],
    trials: Sequence[Trial],
    noted: Mapping[str, Any],
) -> optuna.Study:
    """Make the study anew, with all trials so far.

    The sampler of CMA-ES moves its optimizer on when it is asked for the first trial of a generation, and keeps the
    optimizer in that trial as a pickle. Pickles have no place in a checkpoint, so the sampler is asked again here,
    after each generation, for what it would have kept.
    """
    study = optuna.create_study(storage=storage, study_name="search", sampler=sampler)
    for key, value in of_study(noted).items():
        storage.set_study_system_attr(storage.get_study_id_from_name(study.study_name), key, value)
    generation = None
    for trial in trials:
        attrs = of_trial(trial.attrs)
        before, generation = generation, attrs.get(CMA_GENERATION)
        if before is not None and generation != before:
            asked = study.ask(distributions)
            found = study.get_trials(deepcopy=False)[asked.number].system_attrs
            attrs |= {key: value for key, value in found.items() if key.startswith(CMA_OPTIMIZER)}
            study.tell(asked, state=TrialState.FAIL)
        params = dict(zip(distributions, trial.params, strict=True))
        study.add_trial(create_trial(params=params, distributions=distributions, value=trial.value, system_attrs=attrs))
    return study


@dataclass(frozen=True)
class Curves:
    """Curves over depth, one for each kind of unit, and the allocations that they stand for.

    Attributes:
        problem: The problem, whose budget the allocations meet.
        names: The names of the parameters: a kind of unit and the number of a knot.
        weights: (units, parameters) how much each parameter adds to a unit's sparsity.
    """

    problem: Problem
    names: tuple[str, ...]
    weights: np.ndarray

    @staticmethod
    def of(problem: Problem, knots: int) -> Curves:
        """Return the curves of a problem's space.

        A kind with fewer units than `knots` has a knot for each unit, and a kind whose units have a single level none.
        """
        kinds: defaultdict[str, list[int]] = defaultdict(list)
        for index, unit in enumerate(problem.space.units):
            kinds[kind_of(unit)].append(index)
        names: list[str] = []
        columns: list[np.ndarray] = []
        for kind, members in kinds.items():
            if all(len(problem.space.units[index].levels) == 1 for index in members):
                continue
            count = min(knots, len(members))
            columns.append(np.zeros((count, len(problem.space.units))))
            columns[-1][:, members] = interpolation(len(members), count).T
            names += [f"{kind} {knot + 1}" for knot in range(count)]
        return Curves(problem, tuple(names), np.concatenate(columns or [np.zeros((0, len(problem.space.units)))]).T)

    def allocation(self, params: np.ndarray) -> Allocation:
        """Return the allocation of a trial, or the start if none near the curves meets the budget.

        Args:
            params: (parameters,) the value of the curves at each knot.
        """
        problem, limit = self.problem, self.problem.budget.leading
        dense = np.array([costs[0] for costs in limit.costs], dtype=float)
        taken = np.array([costs[level] for costs, level in zip(limit.costs, problem.start, strict=True)], dtype=float)
        most = 1.0 - _share(np.array([costs[-1] for costs in limit.costs]), dense)
        sparsity = shifted(1.0 - _share(taken, dense) + self.weights @ params, most, dense, float(taken.sum()))
        # An error of rounding to a level is passed on to the next unit of this kind and size, as in `uniform`.
        owed: defaultdict[tuple[str, int], float] = defaultdict(float)
        losses = []
        for unit, costs, wanted in zip(problem.space.units, limit.costs, sparsity.tolist(), strict=True):
            alike = kind_of(unit), costs[0]
            owed[alike] += wanted
            away = (np.array(costs) - costs[0] * (1.0 - owed[alike])) / limit.dense
            losses.append(away**2)
            nearest = int(np.abs(away).round(12).argmin())
            owed[alike] -= 1.0 - costs[nearest] / max(1, costs[0])
        found = relaxed(losses, problem.budget)
        if not problem.allows(found):
            found = knapsack(losses, problem.budget)
        return found if problem.allows(found) else problem.start


def kind_of(unit: Unit) -> str:
    """Return what a unit has in common with those at other depths: its kind and, for a linear layer, which one."""
    if unit.kind not in (WEIGHTS, BITS):
        return unit.kind
    return ".".join(part for part in unit.name.split(".") if not part.isdecimal())


def interpolation(units: int, knots: int) -> np.ndarray:
    """Return how much each knot counts at each depth, (units, knots).

    From each knot to the next goes half a cosine, so that curves are smooth and do not overshoot.
    """
    if knots == 1:
        return np.ones((units, 1))
    at = np.linspace(0.0, knots - 1, units)
    left = np.minimum(at.astype(int), knots - 2)
    right = (1.0 - np.cos(np.pi * (at - left))) / 2.0
    weights = np.zeros((units, knots))
    weights[np.arange(units), left] = 1.0 - right
    weights[np.arange(units), left + 1] = right
    return weights


def shifted(sparsity: np.ndarray, most: np.ndarray, dense: np.ndarray, cost: float) -> np.ndarray:
    """Return the sparsities nearest to these, by least squares, that cost a given total, (units,).

    They are all shifted by the same amount and then cut off to the range from 0 to `most`.

    Args:
        sparsity: (units,) the sparsities to start from.
        most: (units,) the highest sparsity of each unit.
        dense: (units,) the cost of each unit when it is dense.
        cost: What all units are to cost together.
    """
    low, high = -2.0, 2.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        costs = (dense * (1.0 - (sparsity + middle).clip(0.0, most))).sum()
        low, high = (middle, high) if costs > cost else (low, middle)
    return (sparsity + high).clip(0.0, most)


def _share(costs: np.ndarray, dense: np.ndarray) -> np.ndarray:
    share: np.ndarray = costs / np.maximum(1, dense)
    return share


def _told(fitness: float) -> float:
    """Return a fitness as a value that Optuna takes: infinite if it is not a number."""
    return fitness if fitness == fitness else float("inf")
