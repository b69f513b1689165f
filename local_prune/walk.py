"""Builds a supernet: walks through the model sub-block by sub-block, and makes the candidates of each unit.

In front of each sub-block it sums statistics over the calibration text, lets the pruner make candidates, and computes
what the next sub-block will see. One block lies on the device at a time. The residual stream of the text waits in main
memory or on disk; a layer's inputs are computed batch by batch, and at most those of the sub-block's last layer are
kept for a while. A unit that the supernet holds already is not built again: its stored candidates are propagated, which
gives the same stream bit for bit, so that an interrupted build goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, Pruner, Statistics, Task, Track
from local_prune.statistics import LeastSquares
from local_prune.text.attention import blocked_attention
from local_prune.text.dense_stream import DenseStream
from local_prune.text.devices import on_device
from local_prune.text.streams import OWN_OUTPUT, Streams
from supernet.candidates import Candidate, Members, Quantised, member_columns
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, blocks
from supernet.models.placement import Place, full_weight, is_absent, places
from supernet.space import BITS, BLOCK, MIXER, WEIGHTS, Space, Unit
from supernet.store import Supernet

log = logging.getLogger(__name__)

VERSION = 2  # of the walk: raised by one whenever a change to it makes the same pruner give other candidates
TOLD = 0.01  # the share of zero weights from which on the user is told: a few zeros are in every model
Mixture = Mapping[str, Sequence[float]]
Stage = list[tuple[int, str]]  # units whose layers share their inputs: (index of the unit in the space, its layer)


@torch.no_grad()
def build(
    model: PreTrainedModel,
    calibration: Calibration,
    pruner: Pruner,
    supernet: Supernet,
    mixture: Mixture,
    device: torch.device | str,
    track: Track,
    title: str,
    scores: Mapping[str, Tensor] | None = None,
    dense: DenseStream | None = None,
) -> None:
    """Fill the supernet with the candidates of every unit.

    Args:
        model: The dense model.
        calibration: The calibration text and how it is used.
        pruner: Makes the candidates.
        supernet: Is written unit by unit; units that it holds already are kept.
        mixture: For each unit the weights of its levels, which sum to 1, in what the next sub-block sees. With all the
            weight on the dense level no error accumulates; with all of it on another level errors accumulate exactly
            as along an allocation; a spread gives the expectation over levels (Týr-the-Pruner, section 3.2).
        device: Where the block at work lies.
        track: Draws progress.
        title: What the progress is called.
        scores: What `pruner.survey` found before on the same model and text; None to survey now.
        dense: The dense model's residual stream of the same text, if several builds share it; None computes it anew.

    Raises:
        InputError: Weights, activations or candidates are not finite, or files cannot be written.
    """
    with supernet.building():
        supernet.refresh()
        if supernet.complete:
            return
        with closing(Walk(model, calibration, pruner, supernet, mixture, torch.device(device), dense)) as walk:
            _tell_of_zeros(model, pruner, supernet.space)
            if walk.behind_norms:
                log.info("prune.fit=residual is fitted as pruned: a norm follows the sub-blocks")
            walk.scores = pruner.survey(model, calibration, walk.device, track) if scores is None else scores
            for place in track(places(model, supernet.space), title):
                walk.step(place)


class Walk:
    """A build under way; `step` takes one sub-block after the other.

    Attributes:
        streams: The residual stream of the calibration text in the model pruned so far; None for methods that look at
            no inputs.
        behind_norms: Whether `fit=residual` was asked for in vain, as a norm stands between the stream and every layer
            that is pruned.
        scores: What the survey found, by the name of the unit.
        pruning: How many seconds were spent on candidates, rather than on passes over the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        pruner: Pruner,
        supernet: Supernet,
        mixture: Mixture,
        device: torch.device,
        dense: DenseStream | None = None,
    ) -> None:
        self.model, self.calibration, self.pruner, self.supernet = model, calibration, pruner, supernet
        self.mixture, self.device = mixture, device
        self.scores: Mapping[str, Tensor] = {}
        self.pruning = 0.0
        fit, self.behind_norms = fit_of(model, calibration, pruner, supernet.space, mixture)
        self.streams = None if fit is None else Streams(model, calibration, fit, device, supernet.path, dense)

    def close(self) -> None:
        """End the threads that pass text."""
        if self.streams is not None:
            self.streams.close()

    def step(self, place: Place) -> None:
        """Build what is missing of a sub-block's units, and take the text behind the sub-block."""
        part, present = place.part, 1.0
        replaced: dict[str, Tensor] = {}
        with on_device(blocks(self.model)[part.block], self.device), blocked_attention(self.model):
            for stage in _stages(place):
                if not all(self.supernet.has(self._unit(index).name) for index, _ in stage):
                    self._build(part, stage, replaced)
                if self.streams is None:
                    continue
                for index, layer in stage:
                    weights = self.mixture[self._unit(index).name]
                    candidates = {
                        level: self.supernet.candidate(index, level) for level, w in enumerate(weights) if level and w
                    }
                    parameters, share = mean_parameters(part, layer, candidates, weights)
                    replaced |= parameters
                    present *= share
            if self.streams is not None:
                self.streams.advance(part, replaced, present)
        self.supernet.release()

    def _unit(self, index: int) -> Unit:
        return self.supernet.space.units[index]

    def _build(self, part: SubBlock, stage: Stage, replaced: Mapping[str, Tensor]) -> None:
        """Write the candidates of those units of a stage that the supernet does not hold yet."""
        layers = [layer for _, layer in stage]
        width = part.groups.width if part.groups and self._unit(stage[0][0]).name == part.name else 1
        statistics, target = self._statistics(part, layers, width, replaced)
        start = 0
        for index, layer in stage:
            rows = slice(start, start + len(part.weight(layer)))
            start = rows.stop
            if not self.supernet.has(self._unit(index).name):
                own = statistics.outputs(rows) if isinstance(statistics, LeastSquares) else statistics
                self._build_unit(part, layer, self._unit(index), own, target, width)

    def _build_unit(
        self, part: SubBlock, layer: str, unit: Unit, statistics: Statistics | None, target: str, width: int
    ) -> None:
        """Make and write the candidates of one unit, none of which stays in memory."""
        task = Task(unit.name, part.weight(layer), statistics, self.scores.get(unit.name), width, part.bias(layer))
        if not bool(torch.isfinite(task.dense).all()):
            raise InputError(f"{unit.name}: weights are not finite; check the model's weights, or use dtype=float32")
        begun = time.perf_counter()
        candidates = self.pruner.candidates(task, [level.kept for level in unit.levels[1:]])
        if not all(_is_finite(candidate) for candidate in candidates):
            raise InputError(
                f"{unit.name}: what is left is not finite; check the model's weights, or use dtype=float32"
            )
        record: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 3)}
        if isinstance(statistics, LeastSquares):
            errors = statistics.errors(_kept_and_weight(task, part, layer, one) for one in candidates)
            record |= {"errors": [round(error, 6) for error in errors], "target": target}  # what they are relative to
        self.supernet.write(unit.name, candidates, record)
        self.pruning += time.perf_counter() - begun
        log.debug("%s: %s", unit.name, record)

    def _statistics(
        self, part: SubBlock, layers: Sequence[str], width: int, replaced: Mapping[str, Tensor]
    ) -> tuple[Statistics | None, str]:
        """Return the statistics of the inputs that a stage's layers share, and what a fit to them aims at.

        The text is passed for that; statistics are None for methods that look at no inputs.
        """
        dense = torch.cat([part.weight(layer) for layer in layers])
        statistics = self.pruner.statistics(dense, width)
        if statistics is None or self.streams is None:
            return None, OWN_OUTPUT
        aimed = False
        for X, target in self.streams.inputs_and_targets(part, layers, dense, replaced):
            if isinstance(statistics, LeastSquares):
                aimed = target is not None
                statistics.add(X, target)
            else:
                statistics.add(X)
        if isinstance(statistics, LeastSquares) and not aimed:
            statistics.target_own_output(dense.T)
        return statistics, self.streams.target if aimed else OWN_OUTPUT


def fit_of(
    model: PreTrainedModel, calibration: Calibration, pruner: Pruner, space: Space, mixture: Mixture
) -> tuple[str | None, bool]:
    """Return what kept weights are really fitted to, and whether that is `pruned` only as norms follow the sub-blocks.

    The first is None for methods that look at no inputs. The fits `dense` and `residual` differ from `pruned` only
    where errors accumulate, and only for methods that fit weights; elsewhere `pruned` is returned.
    """
    parts = [place.part for place in places(model, space) if place.units]
    statistics = pruner.statistics(parts[0].weight(parts[0].column), 1)
    if statistics is None:
        return None, False
    accumulates = any(weights[0] < 1.0 for weights in mixture.values())
    fit = calibration.fit if accumulates and isinstance(statistics, LeastSquares) else "pruned"
    behind_norms = fit == "residual" and all(part.post_norm is not None for part in parts)
    return "pruned" if behind_norms else fit, behind_norms


def _tell_of_zeros(model: PreTrainedModel, pruner: Pruner, space: Space) -> None:
    """Warn the user if a good part of the weights to prune is zero already, and say what becomes of these zeros."""
    found = [place for place in places(model, space) if place.units]
    layers = [place.part.weight(layer or place.part.column) for place in found for _, layer in place.units]
    share = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    if share < TOLD or space.units[0].kind in (BLOCK, MIXER):
        return
    if space.units[0].kind in (WEIGHTS, BITS):
        log.warning(
            "%.1f%% of the weights to prune are zero already: they go first and stay zero at every level", 100 * share
        )
    elif isinstance(pruner.statistics(layers[0], 1), LeastSquares):
        log.warning(
            "%.1f%% of the weights to fit anew are zero already, and will not be: prune=%s fits all weights of what "
            "it keeps; prune=wanda_sp, taylor and others keep them as they are",
            100 * share,
            pruner.name,
        )


def _stages(place: Place) -> list[Stage]:
    """Return the units of a sub-block in the order of computation; those whose layers share inputs are one stage."""
    part = place.part
    whole: list[Stage] = [[(index, part.column)] for index, layer in place.units if layer is None]
    linear = {layer: index for index, layer in place.units if layer is not None}
    shared: list[Stage] = [[(linear[layer], layer) for layer in stage if layer in linear] for stage in part.stages]
    return whole + [stage for stage in shared if stage]


def _kept_and_weight(task: Task, part: SubBlock, layer: str, candidate: Candidate) -> tuple[Tensor | slice, Tensor]:
    """Return the input columns that a candidate keeps, and their weights (k, d_out)."""
    if isinstance(candidate, Members):
        columns = member_columns(candidate.kept, task.width)
        return columns, task.dense.T[columns] if candidate.weight is None else candidate.weight.T
    return slice(None), full_weight(part, layer, candidate).T


def _is_finite(candidate: Candidate) -> bool:
    """Return whether all values that a candidate stores are finite."""
    values = [
        getattr(candidate, name, None) for name in ("bias", "scale" if isinstance(candidate, Quantised) else "weight")
    ]
    return all(bool(torch.isfinite(value).all()) for value in values if value is not None)


def mean_parameters(
    part: SubBlock, layer: str, candidates: Mapping[int, Candidate], weights: Sequence[float]
) -> tuple[dict[str, Tensor], float]:
    """Return the parameters with which a layer gives the mean output over a unit's levels.

    Removed members do not change what the others put in, and the layer is linear, so the mean output is that of the
    mean weight: one product instead of one for each level. Where several layers of a sub-block are replaced in this
    way, the sub-block's output is the expectation to first order only.

    Args:
        part: The sub-block.
        layer: The linear layer that differs from level to level.
        candidates: The candidate of each level that has a weight, by level; the dense level has none.
        weights: The weights of all levels, which sum to 1.

    Returns:
        The parameters that stand for the sub-block's own, by name, and the share of the weight that is on levels at
        which the sub-block is present. The mean is over these levels alone. No parameters are returned if all of the
        share is on the dense level, or if there is none.
    """
    gone = sum(weights[level] for level, candidate in candidates.items() if is_absent(candidate))
    share = 1.0 - gone
    if share <= 1e-9 or weights[0] >= share - 1e-9:
        return {}, share if share > 1e-9 else 0.0
    dense, bias = part.weight(layer), part.bias(layer)
    mean = weights[0] / share * dense.float()
    shift = torch.zeros(len(dense), device=dense.device) if bias is None else weights[0] / share * bias.float()
    shifted = bias is not None
    for level, candidate in candidates.items():
        if is_absent(candidate):
            continue
        mean += weights[level] / share * full_weight(part, layer, candidate).float()
        own = candidate.bias if isinstance(candidate, Members) and candidate.bias is not None else bias
        if own is not None:
            shift += weights[level] / share * own.to(shift)
            shifted = True
    return part.replaced(layer, mean.to(dense.dtype), shift.to(dense.dtype) if shifted else None), share
