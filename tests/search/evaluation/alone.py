"""What each allocation of a generation is measured as when it is assembled and run alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluation.resources import Resources
from supernet.models.assemble import assemble
from supernet.space import Allocation
from supernet.store import Supernet

Draw = Callable[..., Sequence[Allocation]]
ModelOf = Callable[..., PreTrainedModel]


@torch.no_grad()
def alone(model: PreTrainedModel, supernet: Supernet, allocation: Allocation, ids: Tensor) -> np.ndarray:
    """The mean KL divergence of each sequence's tokens, (sequences,), from whole logits in float64."""
    pruned = assemble(model, supernet, allocation)
    p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, pruned))
    divergence: np.ndarray = (p.exp() * (p - q)).sum(-1).mean(-1).numpy()
    return divergence


def room_for(states: int, model: PreTrainedModel, ids: Tensor, **others: Any) -> Resources:
    """Memory for so many hidden states at a time, each before and behind a sub-block."""
    return Resources(memory=states * 2 * ids.shape[1] * int(model.config.hidden_size) * model.dtype.itemsize, **others)
