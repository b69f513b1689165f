"""The residual stream of the calibration text, batch by batch: what layers get as inputs, and what a fit aims at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration
from local_prune.text.activations import SHARE, Activations
from local_prune.text.dense_stream import DenseStream, state_bytes, state_dtype, state_shapes
from local_prune.text.passes import TextWalk
from local_prune.text.workers import Workers
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.system.memory import available

OWN_OUTPUT = "own output"  # of the dense layer, on the inputs that it gets in the pruned model
TARGETS = {"pruned": OWN_OUTPUT, "dense": "dense output", "residual": "residual"}  # by fit, as the manifest calls them
INPUTS = 256 << 20  # bytes of a last layer's inputs that are kept until the text moves on, instead of computed again


def stream_bytes(model: PreTrainedModel, calibration: Calibration, fit: str) -> int:
    """What the residual streams of the calibration text take: the pruned model's and, where the fit needs it, the
    dense one's.
    """
    size = state_bytes(TextWalk(model, torch.device("cpu")), [calibration.ids])
    return size if fit == "pruned" else 2 * size


def kept_input_bytes(model: PreTrainedModel, calibration: Calibration) -> int:
    """What the inputs of a sub-block's last layer take that are kept while it is pruned."""
    widest = max(part.weight(part.column).shape[1] for part in sub_blocks(model))
    return min(INPUTS, calibration.ids.numel() * widest * model.dtype.itemsize)


class Streams:
    """The residual stream of the calibration text in the pruned model and, where the fit needs it, in the dense one.

    On a CPU a few batches are passed side by side. `close` ends the threads that do so.

    Attributes:
        fit: See `Calibration`.
        pruned: (batch, tokens, hidden) of each batch, before the sub-block at work.
        dense: The same of the dense model; None where nothing is fitted to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        fit: str,
        device: torch.device,
        folder: Path,
        dense: DenseStream | None = None,
    ) -> None:
        """Bring the text before the first sub-block.

        Args:
            model: The dense model.
            calibration: Its text.
            fit: What is really fitted to; see `Calibration`.
            device: Where the block at work lies.
            folder: Where activations lie that main memory has no room for.
            dense: The dense model's stream of the same text, from an earlier build; made anew where there is none.
        """
        self.device, self.fit, self.walk = device, fit, TextWalk(model, device)
        self.workers = Workers(device)
        batches = calibration.ids.split(calibration.batch)
        in_memory = state_bytes(self.walk, batches) <= SHARE * available()
        self.pruned = Activations(state_shapes(self.walk, batches), state_dtype(self.walk), in_memory, folder)
        for index, ids in enumerate(batches):
            self.pruned[index] = self.walk.enter(ids)
        self.dense: DenseStream | None = None
        if fit != "pruned":
            self.dense = dense or DenseStream(self.walk, calibration.ids, calibration.batch, folder, keep=False)
            self.dense.rewind()
        self._numbers = {part.name: number for number, part in enumerate(self.walk.parts)}
        self._inputs: dict[int, Tensor] = {}  # of the last layer of the sub-block at work, by batch

    @property
    def target(self) -> str:
        """What a layer is fitted to that is not fitted to its own output."""
        return TARGETS[self.fit]

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    def inputs_and_targets(
        self, part: SubBlock, layers: Sequence[str], dense: Tensor, replaced: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each batch the inputs X (tokens, d_in) of the layers, and what the fit aims at, (tokens, d_out).

        The target is None where it is the output of the dense layers, stacked weight `dense` (d_out, d_in), on X
        itself. The next batches are computed while one is looked at.
        """

        def computed(index: int) -> tuple[Tensor, Tensor | None]:
            hidden, own = self.pruned[index].to(self.device), self.workers.own(part)
            X = own.inputs(layers[0], hidden, self.walk.context(part, hidden.shape[1]), replaced)
            return X, self._target(own, layers, dense, index)

        kept = 0
        for index, (X, target) in enumerate(self.workers.stream(computed, range(len(self.pruned)))):
            kept += X.nbytes
            if layers[0] == part.column and part.ends_alone and kept <= INPUTS:
                self._inputs[index] = X
            yield X, target

    def _at_residual(self, part: SubBlock, layers: Sequence[str]) -> bool:
        """Whether the fit is to the stream behind the sub-block: a norm between the layer and the stream stands in the
        way.
        """
        return self.fit == "residual" and layers[0] == part.column and part.post_norm is None

    def _target(self, part: SubBlock, layers: Sequence[str], dense: Tensor, index: int) -> Tensor | None:
        if self.dense is None:
            return None
        number = self._numbers[part.name]
        if self.fit == "dense":
            hidden = self.dense.before(number, index)
            return part.inputs(layers[0], hidden, self.walk.context(part, hidden.shape[1])) @ dense.T
        if not self._at_residual(part, layers):
            return None
        behind = self.dense.behind(part, number, index)
        target = (behind.float() - self.pruned[index].to(self.device).float()).flatten(0, 1)
        bias = part.bias(part.column)
        return target if bias is None else target - bias

    def advance(self, part: SubBlock, replaced: Mapping[str, Tensor], present: float) -> None:
        """Move behind the sub-block with these parameters, what it adds taken `present` times.

        Where the inputs of its last layer are known, only that layer is computed.
        """

        def move(index: int) -> None:
            own = self.workers.own(part)
            if present > 0.0:
                hidden = self.pruned[index].to(self.device)
                X = self._inputs.pop(index, None)
                if X is None:
                    change = own.change(hidden, self.walk.context(part, hidden.shape[1]), replaced)
                else:
                    change = own.ended(X.view(*hidden.shape[:2], -1), replaced)
                self.pruned[index] = hidden + (change if present == 1.0 else present * change)
            if self.dense is not None:
                self.dense.pass_by(own, self._numbers[part.name], index)

        self.workers.map(move, range(len(self.pruned)))
        self._inputs.clear()
