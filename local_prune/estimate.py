"""Estimates, before a build starts, what time, disk and memory it will take.

The first block is built from one batch of text, and the rest is arithmetic.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.shared.blockwise import WORKING
from local_prune.pruner import Calibration, Pruner
from local_prune.statistics import LeastSquares
from local_prune.text.dense_stream import DenseStream
from local_prune.text.devices import on_device
from local_prune.text.passes import TextWalk
from local_prune.text.streams import kept_input_bytes, stream_bytes
from local_prune.walk import Mixture, Walk
from supernet.models.architecture import SubBlock, blocks
from supernet.models.placement import Place, places
from supernet.space import BITS, WEIGHTS, Space, Unit
from supernet.store import Supernet

# How many matrices in float32 there are at the peak, as measured on layers of all shapes. Of the Hessian's size while a
# unit is fitted: its upper half, the whole, the damped one, its factor, its inverse, and what these are made with.
HESSIANS = 7.5
FITTED = 6.0  # of the layer's size meanwhile: moment, damped moment, optimum, and what these are made with
RANKED = 9.0  # of the layer's size where weights are only scored: scores, and their orders and ranks in int64
SCORED = 3.0  # of the layer's size where members are only scored
# Of the layer's size for each level: those that stay throughout, and those that only span the block of inputs at work.
LEVELS = {
    WEIGHTS: (1.25, 6.0),
    BITS: (0.8, 2.0),
}
# Activations of the widest layer while a batch passes: gate, up and their product. One of them is in float32, too.
ACTIVATIONS = 3


@dataclass(frozen=True)
class Estimate:
    """What a build will take, about.

    Attributes:
        seconds: How long it takes, with the survey of the dense model if the method makes one.
        stored: Bytes of the supernet on disk.
        device: Bytes on the device at the peak: one block, its statistics and its candidates.
        streams: Bytes of activations in main memory, or on disk where main memory is too small.
        model: Bytes of the dense model in main memory.
        survey: Bytes in main memory that the survey of the dense model keeps; 0 where there is none or they are few.
        states: Bytes of the dense model's activations on disk, which stay until the run ends for builds that follow.
    """

    seconds: float
    stored: int
    device: int
    streams: int
    model: int
    survey: int = 0
    states: int = 0

    def __str__(self) -> str:
        stored, device, streams, model = map(_readable, (self.stored, self.device, self.streams, self.model))
        survey = f"{_readable(self.survey)} for the survey, " if self.survey else ""
        states = f" and {_readable(self.states)} more until the run ends" if self.states else ""
        return (
            f"about {self.seconds:,.0f} s, {stored} on disk{states}; in memory {model} for the model, {streams} for "
            f"activations, {survey}{device} for a block at work"
        )


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@torch.no_grad()
def estimate(
    model: PreTrainedModel,
    calibration: Calibration,
    pruner: Pruner,
    space: Space,
    mixture: Mixture,
    device: torch.device,
    dense: DenseStream | None = None,
) -> Estimate:
    """Build the first block from one batch of text, and estimate from that what the whole build takes.

    The arguments are those of `local_prune.walk.build`.
    """
    layers = len(blocks(model))
    batches = -(-len(calibration.ids) // calibration.batch)
    short = replace(calibration, ids=calibration.ids[: calibration.batch])
    here = [place for place in places(model, space) if place.part.block == 0]
    first = Space(
        tuple(space.units[index] for index in dict.fromkeys(index for place in here for index, _ in place.units))
    )
    with tempfile.TemporaryDirectory() as folder:
        supernet = Supernet.open_or_create(Path(folder), first, {})
        with closing(Walk(model, short, pruner, supernet, mixture, device)) as walk:
            walk.scores = {
                space.units[i].name: _scores(place.part, layer) for place in here for i, layer in place.units
            }
            begun = time.perf_counter()
            for place in places(model, first)[: len(here)]:
                walk.step(place)
            passing = time.perf_counter() - begun - walk.pruning
        stored = sum(entry["bytes"] for entry in supernet.manifest["units"].values())
    surveyed = pruner.survey_tokens(calibration)
    survey = surveyed * _seconds_per_token(model, short, device) if surveyed else 0.0
    streams, states = 0, 0
    if walk.streams is not None:
        streams = stream_bytes(model, calibration, walk.streams.fit) + kept_input_bytes(model, calibration)
        states = dense.kept_bytes if dense is not None and walk.streams.fit != "pruned" else 0
    return Estimate(
        seconds=layers * (walk.pruning + passing * batches + survey),
        stored=stored * layers,
        device=_block_bytes(model) + max((working_bytes(place, pruner, space, short) for place in here), default=0),
        streams=streams,
        model=sum(parameter.nbytes for parameter in model.parameters()),
        survey=pruner.survey_bytes([place.part for place in places(model, space)]),
        states=states,
    )


def _scores(part: SubBlock, layer: str | None) -> Tensor:
    """Return scores as a survey might have found them for a unit.

    Of members the last one has the highest: where scores are orders of removal, it is the one that stays longest.
    """
    if layer is None and part.groups:
        return torch.arange(part.groups.members, dtype=torch.float32)
    return torch.zeros_like(part.weight(layer or part.column))


def _seconds_per_token(model: PreTrainedModel, calibration: Calibration, device: torch.device) -> float:
    """Measure the seconds that a forward pass through the first block takes for each token."""
    walk = TextWalk(model, device)
    hidden = walk.enter(calibration.ids)
    with on_device(blocks(model)[0], device):
        begun = time.perf_counter()
        for part in walk.parts:
            if part.block == 0:
                hidden = part(hidden, walk.context(part, hidden.shape[1]))
        float(hidden.flatten()[0])  # waits for the device
        return (time.perf_counter() - begun) / calibration.ids.numel()


def _block_bytes(model: PreTrainedModel) -> int:
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks(model))


def working_bytes(place: Place, pruner: Pruner, space: Space, batch: Calibration) -> int:
    """Return the bytes on the device at the peak of a sub-block's build, besides its own parameters.

    The peak is either where candidates of the largest unit are made, or where a batch of text passes.

    Args:
        place: The sub-block and its units.
        pruner: The method.
        space: All units.
        batch: The text of one batch.
    """
    part, most = place.part, 0.0
    shapes = {layer: part.weight(layer).shape for stage in part.stages for layer in stage}
    bytes_each = ACTIVATIONS * part.weight(part.column).element_size() + 4
    passing = bytes_each * batch.ids.numel() * max(size for shape in shapes.values() for size in shape)
    for index, layer in place.units:
        d_out, d_in = shapes[layer or part.column]
        statistics = pruner.statistics(part.weight(layer or part.column)[:1], 1)
        stacked = [shapes[one][0] for stage in part.stages if layer in stage for one in stage] or [d_out]
        fits = isinstance(statistics, LeastSquares)
        sums = 4 * d_in * (d_in + 2 * sum(stacked)) if fits else 0  # moments, and dense weights beside each other
        others = 4 * d_in * (sum(stacked) - d_out) if fits else 0  # moments of layers that share the inputs
        pruning = others + _pruning_bytes(part.weight(layer or part.column), pruner, space.units[index], fits)
        most = max(most, pruning, sums + passing if statistics is not None else 0)
    return int(most)


def _pruning_bytes(dense: Tensor, pruner: Pruner, unit: Unit, fits: bool) -> float:
    """Return the bytes that it takes to make the candidates of a unit.

    Args:
        dense: (d_out, d_in), the weight of the layer at work.
        pruner: The method.
        unit: The unit and its levels.
        fits: Whether the method fits the weights that it keeps (`LeastSquares`), or only scores them.
    """
    d_out, d_in = dense.shape
    weight, hessian, levels = 4 * d_out * d_in, 4 * d_in * d_in, unit.levels[1:]
    if not fits and unit.total == 1:  # a sub-block or block that is present or not has no weights to store
        return 0.0
    if not fits:
        masks = len(levels) * d_out * d_in if unit.kind == WEIGHTS else 0
        return (RANKED if unit.kind in LEVELS else SCORED) * weight + masks
    if unit.kind not in LEVELS:
        return HESSIANS * hessian + FITTED * weight + weight * sum(level.kept for level in levels) / unit.total
    at_work = min(len(levels), max(1, WORKING // weight)) if unit.kind == WEIGHTS else len(levels)
    throughout, in_block = LEVELS[unit.kind]
    per_level = throughout + in_block * min(1.0, getattr(pruner, "block", d_in) / d_in)
    finished = (len(levels) - at_work) * d_out * d_in * (1 + dense.element_size())
    return HESSIANS * hessian + FITTED * weight + at_work * per_level * weight + finished
