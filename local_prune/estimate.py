"""What a build will take, before it starts: the first block is built from one batch of text, and the rest is arithmetic."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, Pruner
from local_prune.statistics import LeastSquares
from local_prune.walk import Mixture, Walk, moved, on_device, stream_bytes
from supernet.architecture import SubBlock, blocks, entry, sub_blocks
from supernet.placement import Place, places
from supernet.space import Space
from supernet.store import Supernet

COPIES = 5  # of a Hessian while a unit is pruned: upper half, whole, damped, factor, inverse
STATES = 3  # of the weights of all levels in float32: at work, a copy, and rounded


@dataclass(frozen=True)
class Estimate:
    """Of a build.

    Attributes:
        seconds: With the survey of the dense model, if the method makes one.
        stored: Bytes of the supernet.
        device: Bytes on the device at the peak: one block, its statistics and its candidates.
        streams: Bytes of activations in main memory, or on disk where that has not enough.
        model: Bytes of the dense model in main memory.
    """

    seconds: float
    stored: int
    device: int
    streams: int
    model: int

    def __str__(self) -> str:
        stored, device, streams, model = map(_readable, (self.stored, self.device, self.streams, self.model))
        return (
            f"about {self.seconds:,.0f} s, {stored} on disk; in memory {model} for the model, {streams} for activations, "
            f"{device} for a block at work"
        )


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@torch.no_grad()
def estimate(
    model: PreTrainedModel, calibration: Calibration, pruner: Pruner, space: Space, mixture: Mixture, device: torch.device
) -> Estimate:
    """Probe the first block; the arguments are those of `local_prune.walk.build`."""
    layers = len(blocks(model))
    batches = -(-len(calibration.ids) // calibration.batch)
    short = replace(calibration, ids=calibration.ids[: calibration.batch])
    here = [place for place in places(model, space) if place.part.block == 0]
    first = Space(tuple(space.units[index] for index in dict.fromkeys(index for place in here for index, _ in place.units)))
    with tempfile.TemporaryDirectory() as folder:
        supernet = Supernet.open_or_create(Path(folder), first, {})
        walk = Walk(model, short, pruner, supernet, mixture, device)
        walk.scores = {space.units[i].name: _scores(place.part, layer) for place in here for i, layer in place.units}
        begun = time.perf_counter()
        for place in places(model, first)[: len(here)]:
            walk.step(place)
        passing = time.perf_counter() - begun - walk.pruning
        stored = sum(entry["bytes"] for entry in supernet.manifest["units"].values())
    surveyed = pruner.survey_tokens(calibration)
    survey = surveyed * _seconds_per_token(model, short, device) if surveyed else 0.0
    return Estimate(
        seconds=layers * (walk.pruning + passing * batches + survey),
        stored=stored * layers,
        device=_block_bytes(model) + max((_working_bytes(place, pruner, space) for place in here), default=0),
        streams=0 if walk.streams is None else stream_bytes(model, calibration, walk.streams.fit),
        model=sum(parameter.nbytes for parameter in model.parameters()),
    )


def _scores(part: SubBlock, layer: str | None) -> Tensor:
    """What a survey might have found for a unit: the last member is the best, as an order of members ends with the last kept."""
    if layer is None and part.groups:
        return torch.arange(part.groups.members, dtype=torch.float32)
    return torch.zeros_like(part.weight(layer or part.column))


def _seconds_per_token(model: PreTrainedModel, calibration: Calibration, device: torch.device) -> float:
    """Of a forward pass through the first block."""
    hidden, contexts = entry(model, calibration.ids.to(model.device))
    parts = [part for part in sub_blocks(model) if part.block == 0]
    with on_device(blocks(model)[0], device):
        hidden, context = hidden.to(device), moved(contexts[:1], device)[0]
        begun = time.perf_counter()
        for part in parts:
            hidden = part(hidden, context)
        float(hidden.flatten()[0])  # waits for the device
        return (time.perf_counter() - begun) / calibration.ids.numel()


def _block_bytes(model: PreTrainedModel) -> int:
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks(model))


def _working_bytes(place: Place, pruner: Pruner, space: Space) -> int:
    """Of the largest unit of a sub-block: Hessians, and all levels in float32."""
    most = 0
    for index, layer in place.units:
        weight = place.part.weight(layer or place.part.column)
        d_out, d_in = weight.shape
        square = isinstance(pruner.statistics(weight[:1], 1), LeastSquares)
        levels = len(space.units[index].levels) - 1
        most = max(most, 4 * (COPIES * d_in * d_in * square + STATES * levels * d_out * d_in))
    return most
