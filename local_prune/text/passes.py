"""Passes text through the model, and takes its next-token loss, with one block at a time lent to the device."""

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

PREDICTIONS = 128  # how many tokens have logits at a time: with a vocabulary of 128k they take 64 MiB

Context = Mapping[str, Any]  # what a block's attention takes besides hidden states: masks, rotary tables
Replaced = Mapping[str, Tensor] | None  # parameters that stand for a sub-block's own; None where it is left out


@dataclass(frozen=True)
class Step:
    """One batch of text at one sub-block.

    Attributes:
        part: The sub-block; its block is on the device while the step is looked at.
        context: What its attention takes besides hidden states.
        before: (batch, tokens, hidden), the residual stream before it.
        behind: (batch, tokens, hidden), the residual stream behind it.
        inputs: What its linear layers got, (tokens, d_in) by name; the layers of a stage share one tensor. Empty unless
            that was asked for, and where the sub-block was left out.
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
            model: The model, wherever it lies.
            device: The device that does the work.
            give_back: Whether freed memory is given back to the system behind every block, for where memory is short.
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
        """Return what a sub-block's attention takes besides hidden states of sequences of this length.

        Text of that length must have entered before.
        """
        return self._contexts[length][part.block]

    def lent(self, backwards: bool = False) -> Generator[SubBlock, None, None]:
        """Yield the sub-blocks forwards or backwards; the block of each is on the device meanwhile."""
        layers = blocks(self.model)
        for index, group in groupby(reversed(self.parts) if backwards else self.parts, key=lambda part: part.block):
            with on_device(layers[index], self.device):
                yield from group
            if self.give_back:
                give_back_freed_memory()

    def steps(
        self, ids: Tensor, replaced: Callable[[SubBlock], Replaced] | None = None, record: bool = False
    ) -> Iterator[Step]:
        """Pass one batch of text through all sub-blocks, and yield what happens at each.

        Args:
            ids: (batch, tokens).
            replaced: Gives, for a sub-block, parameters that stand for its own, by name; if it gives None, the
                sub-block is left out.
            record: Whether to record what linear layers get.
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
    """Yield a dictionary that is filled, while the sub-block runs, with what its linear layers get.

    Inputs are (tokens, d_in) by name; those of a stage's first layer stand for all of the stage.
    """
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
    """Return the mean cross-entropy of the next tokens.

    Args:
        model: The model, of which the final norm and the head are used.
        hidden: (batch, tokens, hidden), the residual stream behind the last sub-block.
        ids: (batch, tokens).
        unscored: First positions of each sequence that are left out, as they predict tokens that always begin a
            sequence.

    Raises:
        InputError: Sequences have a single token.
    """
    with torch.no_grad(), lent_head(model, hidden.device):
        total = sum(float(_summed_loss(model, *chunk)) for chunk in _predictions(hidden, ids, unscored))
    return total / predictions(ids, unscored)


def loss_gradient(model: PreTrainedModel, hidden: Tensor, ids: Tensor, unscored: int = 0) -> tuple[float, Tensor]:
    """Return the mean loss, and the gradient of the *summed* loss at the hidden states, which has their shape.

    The arguments and errors are those of `next_token_loss`.
    """
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
    """Return how many next tokens of ids (batch, tokens) are predicted."""
    return ids[:, unscored + 1 :].numel()


def _predictions(hidden: Tensor, ids: Tensor, unscored: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of the states from which a token is predicted, (n, hidden), each with these tokens, (n,)."""
    if ids.shape[1] < 2:
        raise InputError("sequences of one token have no next token to predict; use data.sequence_length=2 or more")
    states, following = hidden[:, unscored:-1].flatten(0, 1), ids[:, unscored + 1 :].flatten().to(hidden.device)
    yield from zip(states.split(PREDICTIONS), following.split(PREDICTIONS), strict=True)


def _summed_loss(model: PreTrainedModel, hidden: Tensor, following: Tensor) -> Tensor:
    """Return the summed cross-entropy of tokens (n,) that follow states (n, hidden) before the final norm."""
    normed, head = final_norm_and_head(model, hidden.unsqueeze(0))
    logits = head.linear(normed).squeeze(0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return cross_entropy(logits, following, reduction="sum")


@contextmanager
def lent_head(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Lend the final norm and the head, which turn the residual stream into logits, to the device."""
    with on_device(model.get_submodule(family_of(model).final_norm), device), on_device(head_of(model).linear, device):
        yield
