"""Exports of models that were assembled without a run."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from search.export.base import Card, Pruned
from search.export.check import Checked, Sample
from search.export.huggingface import HuggingFace
from supernet.store import Supernet


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: Card = lambda _: "",
    dtype: torch.dtype | None = None,
    sample: Sample | None = None,
    source: Path | None = None,
) -> Checked | None:
    """A Hugging Face folder, which needs neither the supernet nor the allocation that the model is of."""
    nothing = cast(Supernet, None), cast(Any, None)
    return HuggingFace().write(Pruned(model, *nothing, tokenizer, dtype or model.dtype, sample, source), folder, card)
