"""Passes of the dense model over text, and their loss, with one block at a time lent to the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from local_prune.text.devices import moved, on_device
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, blocks, sub_blocks
from supernet.models.families import family_of
from supernet.models.forward import entry, final_norm_and_head, head_of
from supernet.system.memory import give_back_freed_memory

PREDICTIONS = 128  # whose logits exist at a time: with a vocabulary of 128k they take 64 MiB

Context = Mapping[str, Any]  # what a block's attention gets besides the hidden states
Replaced = Mapping[str, Tensor] | None  # of a sub-block's module, that stand for its own; None where it is left out


@dataclass(frozen=True)
class Step:
    """One batch of text at one sub-block.

    Attributes:
        part: The sub-block; its block is on the device while the step is looked at.
        context: What its attention gets besides the hidden states.
        before: (batch, tokens, hidden) residual stream before it.
        behind: The same behind it.
        inputs: What its linear layers got, (tokens, d_in) by name, of each stage's first layer for all of them; empty
            unless they were asked for, or where the sub-block was left out.
    """

    part: SubBlock
    context: Context
    before: Tensor
    behind: Tensor
    inputs: Mapping[str, Tensor]


class TextWalk:
    """The way of text through a model's blocks: build, surveys, gradients and allocation rules all go by it.

    One block at a time is lent to the device. Masks and rotary tables are made once for each length of sequences: as
    sequences are never padded, what a block is told of one sequence serves any number of them.

    Attributes:
        parts: The model's sub-blocks, in the order of the forward pass.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, give_back: bool = False) -> None:
        """Bind to a model.

        Args:
            model: Wherever it lies.
            device: Does the work.
            give_back: Whether the system gets back what is freed, behind every block: where memory is short.
        """
        self.model, self.device, self.give_back = model, device, give_back
        self.parts = sub_blocks(model)
        self._contexts: dict[int, list[dict[str, Any]]] = {}  # by length of the sequences, for each block

    def enter(self, ids: Tensor) -> Tensor:
        """Turn ids (batch, tokens) into the residual stream (batch, tokens, hidden) before the first sub-block."""
        ids = ids.to(self.model.device)
        if ids.shape[1] not in self._contexts:
            self._contexts[ids.shape[1]] = moved(entry(self.model, ids[:1])[1], self.device)
        return entry(self.model, ids)[0].to(self.device)

    def context(self, part: SubBlock, length: int) -> Context:
        """What the attention of a sub-block's block gets besides hidden states of sequences of this length.

        Text of that length has entered before.
        """
        return self._contexts[length][part.block]

    def lent(self, backwards: bool = False) -> Generator[SubBlock, None, None]:
        """The sub-blocks one after the other, or the other way round; the block of each is on the device meanwhile."""
        layers = blocks(self.model)
        for index, group in groupby(reversed(self.parts) if backwards else self.parts, key=lambda part: part.block):
            with on_device(layers[index], self.device):
                yield from group
            if self.give_back:
                give_back_freed_memory()

    def steps(
        self, ids: Tensor, replaced: Callable[[SubBlock], Replaced] | None = None, record: bool = False
    ) -> Iterator[Step]:
        """Pass one batch of text through all sub-blocks.

        Args:
            ids: (batch, tokens).
            replaced: Parameters of a sub-block's module that stand for its own, by name; None leaves the sub-block out.
            record: Whether to note what linear layers get.
        """
        hidden = self.enter(ids)
        for part in self.lent():
            weights = replaced(part) if replaced else {}
            context, behind, inputs = self.context(part, hidden.shape[1]), hidden, dict[str, Tensor]()
            if weights is not None:
                with recorded(part) if record else nullcontext(inputs) as inputs:
                    behind = part(hidden, context, weights)
            yield Step(part, context, hidden, behind, inputs)
            hidden = behind


@contextmanager
def recorded(part: SubBlock) -> Iterator[dict[str, Tensor]]:
    """What the linear layers of a sub-block get while it runs, (tokens, d_in) by name."""
    seen: dict[str, Tensor] = {}

    def hooked(layers: Sequence[str]) -> RemovableHandle:
        layer = part.layer(layers[0])

        def record(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.update(dict.fromkeys(layers, part.receive(layer, *arguments, **named)))

        return layer.module.register_forward_pre_hook(record, with_kwargs=True)

    handles = [hooked(stage) for stage in part.stages]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def next_token_loss(model: PreTrainedModel, hidden: Tensor, ids: Tensor, unscored: int = 0) -> float:
    """Mean cross-entropy of the next tokens.

    Args:
        hidden: (batch, tokens, hidden), the residual stream behind the last sub-block.
        ids: (batch, tokens).
        unscored: First positions of each sequence that are left out; see `Calibration`.
    """
    with torch.no_grad(), lent_head(model, hidden.device):
        total = sum(float(_summed_loss(model, *chunk)) for chunk in _predictions(hidden, ids, unscored))
    return total / predictions(ids, unscored)


def loss_gradient(model: PreTrainedModel, hidden: Tensor, ids: Tensor, unscored: int = 0) -> tuple[float, Tensor]:
    """The mean loss, and the gradient of the *summed* loss at the hidden states; arguments as for `next_token_loss`."""
    total, found = 0.0, list[Tensor]()
    with torch.enable_grad(), lent_head(model, hidden.device):
        for states, following in _predictions(hidden.detach(), ids, unscored):
            states = states.detach().requires_grad_()
            loss = _summed_loss(model, states, following)
            found += torch.autograd.grad(loss, states)
            total += float(loss.detach())
    gradient = torch.cat(found).view(len(ids), -1, hidden.shape[-1])
    gradient = pad(gradient, (0, 0, unscored, 1))  # nothing is predicted from the last token
    return total / predictions(ids, unscored), gradient


def predictions(ids: Tensor, unscored: int = 0) -> int:
    """How many next tokens are predicted."""
    return ids[:, unscored + 1 :].numel()


def _predictions(hidden: Tensor, ids: Tensor, unscored: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the hidden states from which a token is predicted, (n, hidden), and of these tokens, (n,)."""
    if ids.shape[1] < 2:
        raise InputError("sequences of one token have no next token to predict; use data.sequence_length=2 or more")
    states, following = hidden[:, unscored:-1].flatten(0, 1), ids[:, unscored + 1 :].flatten().to(hidden.device)
    yield from zip(states.split(PREDICTIONS), following.split(PREDICTIONS), strict=True)


def _summed_loss(model: PreTrainedModel, hidden: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of the model's logits, summed: hidden (n, hidden) before the final norm, following (n,)."""
    normed, head = final_norm_and_head(model, hidden.unsqueeze(0))
    logits = head.linear(normed).squeeze(0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return cross_entropy(logits, following, reduction="sum")


@contextmanager
def lent_head(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Lend what turns the residual stream into logits to the device: the final norm and the head."""
    with on_device(model.get_submodule(family_of(model).final_norm), device), on_device(head_of(model).linear, device):
        yield
