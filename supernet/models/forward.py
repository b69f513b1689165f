"""What a model does before its first sub-block and behind its last one, and whether that is all that it does.

`entry` gives the first hidden states, the sub-blocks are called one after the other, and `final_norm_and_head` leads to
the logits. `check_walk` compares that with the model's own forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supernet.errors import InputError
from supernet.models.architecture import blocks, sub_blocks
from supernet.models.families import family_of
from supernet.models.layers import forward_replaced
from supernet.system.memory import is_out_of_memory

# Arguments of a block that a pass without a cache does not need.
CACHE = ("past_key_values", "cache", "use_cache", "cache_params")


def entry(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first block receives, and the context (masks, positions) that each block's attention gets.

    The model's own forward runs with every block replaced by the identity, so that each family's way of making
    embeddings, positions and masks is followed without knowing it.

    Args:
        ids: (batch, tokens) token ids, without padding.

    Returns:
        The residual stream (batch, tokens, hidden) and one dict of keyword arguments a block.
    """
    contexts: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def recording(block: nn.Module) -> Callable[..., Tensor]:
        names = tuple(inspect.signature(type(block).forward).parameters)[2:]  # without itself and the hidden states

        def record(hidden: Tensor, *unnamed: Any, **named: Any) -> Tensor:
            first.append(hidden)
            arguments = dict(zip(names, unnamed, strict=False)) | named
            contexts.append({k: v for k, v in arguments.items() if k not in CACHE})
            return hidden

        return record

    with forward_replaced({block: recording(block) for block in blocks(model)}):
        model.base_model(input_ids=ids, use_cache=False)
    return first[0], contexts


@dataclass(frozen=True)
class LmHead:
    """The language-model head: it turns normalised last hidden states into logits.

    Attributes:
        linear: The linear layer.
        cap: Where it is set, the logits are `cap * tanh(linear(hidden) / cap)`.
    """

    linear: nn.Linear
    cap: float | None


def final_norm_and_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, LmHead]:
    """The last hidden states (batch, tokens, hidden), normalised and in the dtype of the head, and the head."""
    norm, head = model.get_submodule(family_of(model).final_norm), head_of(model)
    return norm(hidden).to(head.linear.weight.dtype), head


def head_of(model: PreTrainedModel) -> LmHead:
    """The language-model head of a model."""
    linear = model.get_output_embeddings()
    assert isinstance(linear, nn.Linear)
    return LmHead(linear, getattr(model.config, "final_logit_softcapping", None))


@torch.no_grad()
def check_walk(model: PreTrainedModel) -> None:
    """Raise InputError if the sub-blocks, one after the other, and the head do not compute what the model does.

    They are compared on a few tokens. So an entry in `FAMILIES` that does not fit, or a model that does more (scales
    what a sub-block adds, or the logits), is told before any work. Differences may be half of the dtype's digits;
    output that is not finite is told later, with its unit.
    """
    family_of(model)  # before anything is asked of a model that may be of any kind
    ids = (torch.arange(8, device=model.device) % int(model.config.vocab_size)).unsqueeze(0)
    try:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        hidden, contexts = entry(model, ids)
        for part in sub_blocks(model):
            hidden = part(hidden, contexts[part.block])
        normed, head = final_norm_and_head(model, hidden)
        walked = head.linear(normed)
    except InputError:
        raise
    except Exception as error:  # whatever a model's own code comes to where sizes or modules are not what it expects
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _does_not_fit(model, f"modules are called or made differently ({said})") from error
    walked = walked if head.cap is None else head.cap * torch.tanh(walked / head.cap)
    for what, own, found in (("last hidden states", states, normed), ("logits", logits, walked)):
        difference, largest = float((own - found).abs().max()), float(own.abs().max())
        if largest < torch.inf and not difference <= torch.finfo(model.dtype).eps ** 0.5 * largest:
            raise _does_not_fit(model, f"its sub-blocks, one by one, end in other {what} than the model's own code")


def _does_not_fit(model: PreTrainedModel, why: str) -> InputError:
    where = f"the entry '{model.config.model_type}' in supernet/models/families.py does not fit this model"
    return InputError(
        f"{where}: {why}; correct it, or choose another model: sub-blocks must be x + post_norm(module(norm(x)))"
    )
