"""Weights rounded to what a file can hold, so that what is measured is what is written."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from supernet.errors import InputError


@torch.no_grad()
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round the model's weights, in place, to what a file of another dtype can hold, and return it.

    Weights that do not change keep sharing their memory with the dense model.
    """
    own = model.dtype
    if torch.finfo(dtype).eps > torch.finfo(own).eps or (own, dtype) == (torch.bfloat16, torch.float16):
        for parameter in model.parameters():
            if parameter.dtype == own:
                near = parameter.to(dtype).to(own)
                if not bool(near.isfinite().all()):
                    name = str(dtype).removeprefix("torch.")
                    raise InputError(
                        f"export.dtype={name} cannot hold weights as large as this model's; use bfloat16 or float32"
                    )
                if not torch.equal(near, parameter):
                    parameter.data = near
    return model
