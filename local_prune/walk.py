"""Through the model, sub-block by sub-block: statistics, candidates, and what the next sub-block will see.

One block lies on the device at a time; the residual stream of the calibration text waits in main memory. A unit that the
supernet holds already is not built again: its stored candidates are propagated, which gives the same stream bit for bit, so
an interrupted build goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.statistics import LeastSquares
from supernet.architecture import SubBlock, blocks, entry, sub_blocks
from supernet.encoding import Candidate, member_columns
from supernet.errors import InputError
from supernet.space import Unit
from supernet.store import Supernet

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Track = Callable[[Sequence[Item], str], Iterable[Item]]  # draws progress over a sequence with a title

FITS = ("pruned", "dense", "residual")
METHOD = 1  # raised when the same settings would give other candidates, so that older supernets are not taken for them


class Pruner(Protocol):
    """Makes one unit's candidates out of its calibration statistics."""

    def candidates(self, problem: LeastSquares, dense: Tensor, kept: Sequence[int], width: int, where: str) -> list[Candidate]:
        """One candidate for each number of members in `kept` (falling, without the dense level); see `ObsPruner`."""
        ...


@dataclass(frozen=True)
class Calibration:
    """How the calibration text is used.

    Attributes:
        ids: (sequences, tokens) int64.
        batch: Sequences in one forward pass.
        fit: What the kept weights are fitted to: `pruned`, the dense layer's output on the inputs of the pruned model;
            `dense`, its output on the inputs of the dense model; `residual`, the dense model's whole residual stream behind
            the sub-block, so that each fit also makes up for the error that came before it.
    """

    ids: Tensor
    batch: int = 4
    fit: str = "pruned"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InputError(f"prune.fit={self.fit} is not known; choose one of {', '.join(FITS)}")
        if self.batch < 1:
            raise InputError(f"prune.batch={self.batch} must be at least 1 sequence")


@torch.no_grad()
def build(
    model: PreTrainedModel,
    calibration: Calibration,
    pruner: Pruner,
    supernet: Supernet,
    mixture: Mapping[str, Sequence[float]],
    device: torch.device | str,
    track: Track[SubBlock],
    title: str,
) -> None:
    """Fill the supernet with the candidates of every unit.

    Args:
        model: The dense model.
        calibration: Text and how to use it.
        pruner: Makes candidates.
        supernet: Written unit by unit; units that it holds are kept.
        mixture: Unit -> weight of each of its levels in the output that the next sub-block sees; they sum to 1. All on one
            level is exact error accumulation along an allocation, a spread is its expectation (Týr-the-Pruner, section 3.2).
        device: Where the block at work lies.
        track: Draws progress.
        title: What the progress is called.
    """
    with supernet.building():
        supernet.refresh()
        if supernet.complete:
            return
        streams = _Streams(model, calibration, device)
        units = {unit.name: unit for unit in supernet.space.units}
        for part in track(sub_blocks(model), title):
            _prune_one(part, units[part.name], streams, pruner, supernet, mixture[part.name])


def _prune_one(
    part: SubBlock, unit: Unit, streams: _Streams, pruner: Pruner, supernet: Supernet, weights: Sequence[float]
) -> None:
    with streams.on_device(part):
        inputs = streams.inputs(part, streams.pruned)
        outputs = streams.dense_outputs(part)
        if not supernet.has(unit.name):
            start = time.perf_counter()
            problem = streams.problem(part, inputs, outputs)
            dense = part.projection.weight
            candidates = pruner.candidates(problem, dense, [v.kept for v in unit.levels[1:]], part.width, unit.name)
            errors = problem.errors((member_columns(c.kept, part.width), c.weight.T) for c in candidates)
            seconds = round(time.perf_counter() - start, 3)
            supernet.write(unit.name, candidates, {"errors": [round(e, 6) for e in errors], "seconds": seconds})
            log.debug("%s: %.1f s, relative output errors %s", unit.name, seconds, errors)
        index = supernet.space.units.index(unit)
        mean, bias = mean_projection(part, supernet.weights(index), weights)
        streams.advance(inputs, outputs, mean, bias)


def mean_projection(
    part: SubBlock, candidates: Mapping[int, Candidate], weights: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """The projection whose output is the mixture of all levels' outputs.

    Levels differ in the projection alone (removed members do not change what the others put in), and it is linear, so the
    mean output is that of the mean weight: one product instead of one a level.

    Returns:
        Weight (d_out, d_in) in float32, and the bias, without the share of levels that drop the whole sub-block.
    """
    dense = part.projection.weight
    mean = weights[0] * dense.float()
    for level, candidate in candidates.items():
        columns = member_columns(candidate.kept.to(dense.device), part.width)
        mean.index_add_(1, columns, candidate.weight.to(dense.device, torch.float32), alpha=weights[level])
    bias = part.projection.bias
    if bias is None:
        return mean, None
    present = weights[0] + sum(weights[level] for level, candidate in candidates.items() if len(candidate.kept))
    return mean, bias * present


def activation_bytes(parts: Sequence[SubBlock], fit: str) -> int:
    """Main memory that a calibration token takes while a build runs.

    The residual stream of the pruned model, the widest projection's inputs and, where the fit needs it, the stream of the dense
    model before and behind the sub-block at work.
    """
    hidden, widest = parts[0].projection.out_features, max(part.projection.in_features for part in parts)
    return (hidden * (1 if fit == "pruned" else 3) + widest) * parts[0].projection.weight.element_size()


class _Streams:
    """The residual stream of the calibration text in the pruned model and, where the fit needs it, in the dense one."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.fit = calibration.fit
        self.blocks = blocks(model)
        batches = [entry(model, ids.to(model.device)) for ids in calibration.ids.split(calibration.batch)]
        self.pruned = [hidden.cpu() for hidden, _ in batches]
        self.dense = list(self.pruned) if self.fit != "pruned" else []
        # Sequences are equally long and unpadded, so masks and positions of a whole batch serve every batch but a short last one.
        self.contexts = [_moved(contexts, self.device) for _, contexts in (batches[0], batches[-1])]

    @contextmanager
    def on_device(self, part: SubBlock) -> Iterator[None]:
        """Lend the sub-block's block to the device, and put it back where it was."""
        block = self.blocks[part.block]
        home = next(block.parameters()).device
        block.to(self.device)
        try:
            yield
        finally:
            block.to(home)

    def context(self, part: SubBlock, hidden: Tensor) -> dict[str, Any]:
        return self.contexts[0 if len(hidden) == len(self.pruned[0]) else 1][part.block]

    def inputs(self, part: SubBlock, stream: list[Tensor]) -> list[Tensor]:
        """The projection's inputs, (batch * tokens, d_in) a batch, in main memory."""
        return [part.projection_inputs(hidden.to(self.device), self.context(part, hidden)).cpu() for hidden in stream]

    def dense_outputs(self, part: SubBlock) -> list[Tensor]:
        """The dense model's stream behind the sub-block, (batch, tokens, hidden); empty where the fit does not need it."""
        return [part(hidden.to(self.device), self.context(part, hidden)).cpu() for hidden in self.dense]

    def problem(self, part: SubBlock, inputs: list[Tensor], outputs: list[Tensor]) -> LeastSquares:
        layer = part.projection
        problem = LeastSquares.zeros(layer.in_features, layer.out_features, self.device)
        for index, X in enumerate(inputs):
            problem.add(X.to(self.device), self._target(layer.bias, index, outputs))
        if not outputs:
            problem.target_own_output(layer.weight.T)
        return problem

    def _target(self, bias: Tensor | None, index: int, outputs: list[Tensor]) -> Tensor | None:
        if not outputs:
            return None
        before = self.dense[index] if self.fit == "dense" else self.pruned[index]
        target = (outputs[index].to(self.device).float() - before.to(self.device).float()).flatten(0, 1)
        return target if bias is None else target - bias

    def advance(self, inputs: list[Tensor], outputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.to(inputs[0].dtype)
        for index, X in enumerate(inputs):
            hidden = self.pruned[index]
            output = torch.nn.functional.linear(X.to(self.device), weight, bias)
            self.pruned[index] = hidden + output.view(hidden.shape).cpu()
        if outputs:
            self.dense = outputs


def _moved(contexts: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return [{key: move(value) for key, value in context.items()} for context in contexts]
