"""The residual stream of the calibration text, batch by batch: what layers get as inputs, and what a fit aims at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration
from local_prune.text.activations import SHARE, Activations
from local_prune.text.devices import moved
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.forward import entry
from supernet.system.memory import available

OWN_OUTPUT = "own output"  # of the dense layer, on the inputs that it gets in the pruned model
TARGETS = {"pruned": OWN_OUTPUT, "dense": "dense output", "residual": "residual"}  # by fit, as the manifest calls them


def stream_bytes(model: PreTrainedModel, calibration: Calibration, fit: str) -> int:
    """What the residual streams of the calibration text take: the pruned model's and, where the fit needs it, the dense
    one's.
    """
    token = int(model.config.hidden_size) * _stream_dtype(model).itemsize
    return calibration.ids.numel() * token * (1 if fit == "pruned" else 2)


def _stream_dtype(model: PreTrainedModel) -> torch.dtype:
    return torch.float32 if sub_blocks(model)[0].wide_residual else model.dtype


class Streams:
    """The residual stream of the calibration text in the pruned model and, where the fit needs it, in the dense one.

    Attributes:
        fit: See `Calibration`.
        pruned: (batch, tokens, hidden) of each batch, before the sub-block at work.
        dense: The same of the dense model; None where nothing is fitted to it.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: Calibration, fit: str, device: torch.device, folder: Path
    ) -> None:
        self.device, self.fit = device, fit
        batches = calibration.ids.split(calibration.batch)
        shapes, dtype = [(*ids.shape, int(model.config.hidden_size)) for ids in batches], _stream_dtype(model)
        in_memory = stream_bytes(model, calibration, fit) <= SHARE * available()
        self.pruned = Activations(shapes, dtype, in_memory, folder)
        self.dense = Activations(shapes, dtype, in_memory, folder) if fit != "pruned" else None
        self._ahead = False  # whether the dense stream is behind the sub-block at work already
        # Sequences are equally long and unpadded, so masks and positions of a whole batch serve every batch but a short
        # last one.
        self._contexts: list[list[dict[str, Any]]] = []
        for index, ids in enumerate(batches):
            hidden, contexts = entry(model, ids.to(model.device))
            self.pruned[index] = hidden
            if self.dense is not None:
                self.dense[index] = hidden
            if index == 0 or len(ids) < len(batches[0]):
                self._contexts.append(moved(contexts, device))

    @property
    def target(self) -> str:
        """What a layer is fitted to that is not fitted to its own output."""
        return TARGETS[self.fit]

    def _context(self, part: SubBlock, hidden: Tensor) -> dict[str, Any]:
        return self._contexts[0 if len(hidden) == len(self.pruned[0]) else 1][part.block]

    def inputs_and_targets(
        self, part: SubBlock, layers: Sequence[str], dense: Tensor, replaced: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each batch the inputs X (tokens, d_in) of the layers, and what the fit aims at, (tokens, d_out).

        The target is None where it is the output of the dense layers, stacked weight `dense` (d_out, d_in), on X
        itself.
        """
        for index in range(len(self.pruned)):
            hidden = self.pruned[index].to(self.device)
            X = part.inputs(layers[0], hidden, self._context(part, hidden), replaced)
            yield X, self._target(part, layers, dense, index)
        self._ahead = self._ahead or self._at_residual(part, layers)

    def _at_residual(self, part: SubBlock, layers: Sequence[str]) -> bool:
        """Whether the fit is to the stream behind the sub-block: a norm between the layer and the stream stands in the
        way.
        """
        return self.fit == "residual" and layers[0] == part.column and part.post_norm is None

    def _target(self, part: SubBlock, layers: Sequence[str], dense: Tensor, index: int) -> Tensor | None:
        if self.dense is None or self._ahead:
            return None
        hidden = self.dense[index].to(self.device)
        context = self._context(part, hidden)
        if self.fit == "dense":
            return part.inputs(layers[0], hidden, context) @ dense.T
        if not self._at_residual(part, layers):
            return None
        behind = part(hidden, context)
        self.dense[index] = behind  # nothing behind this layer will ask for what was before
        target = (behind.float() - self.pruned[index].to(self.device).float()).flatten(0, 1)
        bias = part.bias(part.column)
        return target if bias is None else target - bias

    def advance(self, part: SubBlock, replaced: Mapping[str, Tensor], present: float) -> None:
        """Move behind the sub-block with these parameters, what it adds taken `present` times."""
        for index in range(len(self.pruned)):
            hidden = self.pruned[index].to(self.device)
            context = self._context(part, hidden)
            if present == 1.0:
                self.pruned[index] = part(hidden, context, replaced)
            elif present > 0.0:
                self.pruned[index] = hidden + present * part.change(hidden, context, replaced)
            if self.dense is not None and not self._ahead:
                self.dense[index] = part(self.dense[index].to(self.device), context)
        self._ahead = False
