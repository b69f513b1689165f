"""Passes of the dense model over text, and their loss, with one block at a time lent to the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from local_prune.text.devices import moved, on_device
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, blocks, sub_blocks
from supernet.models.families import family_of
from supernet.models.forward import entry, final_norm_and_head, head_of

PREDICTIONS = 128  # whose logits exist at a time: with a vocabulary of 128k they take 64 MiB

Context = Mapping[str, Any]  # what a block's attention gets besides the hidden states


def begin(model: PreTrainedModel, ids: Tensor, device: torch.device) -> tuple[Tensor, list[dict[str, Any]]]:
    """`entry`, on the device. ids: (batch, tokens)."""
    hidden, contexts = entry(model, ids.to(model.device))
    return hidden.to(device), moved(contexts, device)


def lent_parts(model: PreTrainedModel, device: torch.device, backwards: bool = False) -> Iterator[SubBlock]:
    """The sub-blocks in the order of the forward pass, or the other way round; the block of each is on the device
    meanwhile.
    """
    parts, layers = sub_blocks(model), blocks(model)
    for index, group in groupby(reversed(parts) if backwards else parts, key=lambda part: part.block):
        with on_device(layers[index], device):
            yield from group


def next_token_loss(model: PreTrainedModel, hidden: Tensor, ids: Tensor, unscored: int = 0) -> float:
    """Mean cross-entropy of the next tokens.

    Args:
        hidden: (batch, tokens, hidden), the residual stream behind the last sub-block.
        ids: (batch, tokens).
        unscored: First positions of each sequence that are left out; see `Calibration`.
    """
    with torch.no_grad(), _lent_head(model, hidden.device):
        total = sum(float(_summed_loss(model, *chunk)) for chunk in _predictions(hidden, ids, unscored))
    return total / predictions(ids, unscored)


def loss_gradient(model: PreTrainedModel, hidden: Tensor, ids: Tensor, unscored: int = 0) -> tuple[float, Tensor]:
    """The mean loss, and the gradient of the *summed* loss at the hidden states; arguments as for `next_token_loss`."""
    total, found = 0.0, list[Tensor]()
    with torch.enable_grad(), _lent_head(model, hidden.device):
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
def _lent_head(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    with on_device(model.get_submodule(family_of(model).final_norm), device), on_device(head_of(model).linear, device):
        yield
