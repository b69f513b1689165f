"""Carries the calibration text through the pruned and the dense model, batch by batch.

From its residual streams follow the inputs of the layers at work, and what a fit of their weights aims at.
"""

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

OWN_OUTPUT = "own output"  # the target that is the dense layer's output on the inputs that it gets in the pruned model
TARGETS = {"pruned": OWN_OUTPUT, "dense": "dense output", "residual": "residual"}  # by fit, as the manifest calls them
INPUTS = 256 << 20  # the most bytes of a last layer's inputs that are kept, so that they need not be computed twice


def stream_bytes(model: PreTrainedModel, calibration: Calibration, fit: str) -> int:
    """Return how many bytes the residual streams of the calibration text take.

    There is the pruned model's stream and, where the fit needs it, the dense model's.
    """
    size = state_bytes(TextWalk(model, torch.device("cpu")), [calibration.ids])
    return size if fit == "pruned" else 2 * size


def kept_input_bytes(model: PreTrainedModel, calibration: Calibration) -> int:
    """Return how many bytes are kept, at most, of the inputs of a sub-block's last layer while it is pruned."""
    widest = max(part.weight(part.column).shape[1] for part in sub_blocks(model))
    return min(INPUTS, calibration.ids.numel() * widest * model.dtype.itemsize)


class Streams:
    """The residual stream of the calibration text in the pruned model and, where the fit needs it, in the dense one.

    On a CPU a few batches are passed side by side. `close` ends the threads that do so.

    Attributes:
        fit: What is really fitted to, one of `FITS`.
        pruned: The pruned model's stream before the sub-block at work, (batch, tokens, hidden) for each batch.
        dense: The dense model's stream; None where nothing is fitted to it.
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
            calibration: The text.
            fit: What is really fitted to (`local_prune.walk.fit_of`), which may differ from `calibration.fit`.
            device: Where the block at work lies.
            folder: Where activations lie that main memory has no room for.
            dense: The dense model's stream of the same text, which builds share; None makes one if the fit needs it.
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
        """The name of what layers are fitted to, unless they are fitted to their own output."""
        return TARGETS[self.fit]

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    def inputs_and_targets(
        self, part: SubBlock, layers: Sequence[str], dense: Tensor, replaced: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, for each batch, the inputs X of layers that share them, and what the fit of their weights aims at.

        The next batches are computed while one is looked at.

        Args:
            part: The sub-block at work, on the device.
            layers: The names of the layers.
            dense: (d_out, d_in), their stacked dense weights.
            replaced: Parameters of the sub-block that stand for its own, by name.

        Yields:
            X (tokens, d_in), and the target (tokens, d_out) or None where that is the dense layers' output on X itself.
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
        """Return whether layers are fitted to the residual stream behind the sub-block.

        Only the last layer can be, and only if no norm stands between it and the stream.
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
        """Take the text behind the sub-block. Where the inputs of its last layer are kept, only that layer is computed.

        Args:
            part: The sub-block, on the device.
            replaced: Parameters that stand for its own, by name, in the pruned model.
            present: The factor from 0 to 1 on what it adds to the pruned model's stream.
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
