"""A Hugging Face folder with really smaller layers, which `from_pretrained` loads in any process.

Layers of different sizes are described by `per_layer_config` and built by one modelling file that is copied beside the
weights (`trust_remote_code=True`); where all layers are alike, the folder is of the stock architecture.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from search.export.base import Card, Pruned
from search.export.carried import carry, drop_foreign_code
from search.export.check import Checked, check_assembled, check_folder
from search.export.whole import whole
from search.inputs.models import LoadedModel
from search.inputs.models.loaded import DTYPES
from supernet.errors import InputError
from supernet.models import modeling_pruned


@dataclass(frozen=True)
class HuggingFace:
    """Writes a folder that `from_pretrained` loads.

    Attributes:
        check: Whether a fresh process must find in the folder the loss that the model in memory has.
        dtype: Of the weights in the file: bfloat16, float16 or float32; None for that of the dense checkpoint.
    """

    check: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        if type(self.check) is not bool:
            raise InputError(f"export.check={self.check} must be true or false")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(
                f"export.dtype={self.dtype} is not one that models are written in; use null, {', '.join(DTYPES)}"
            )

    def dtype_of(self, dense: LoadedModel) -> torch.dtype:
        """Return the dtype that was asked for, else the checkpoint's."""
        if self.dtype is None:
            return dense.stored_dtype or dense.model.dtype
        return DTYPES[self.dtype]

    @torch.no_grad()
    def write(self, pruned: Pruned, folder: Path, card: Card) -> Checked | None:
        """Write weights, configuration, tokenizer and card, and the modelling file where layers differ in size."""
        model, sample, computed = pruned.model, pruned.sample, pruned.model.dtype
        losses = check_assembled(model, sample) if sample is not None else []
        with whole(folder) as draft:
            _write_model(model, draft, pruned.dtype)
            pruned.tokenizer.save_pretrained(draft)
            carry(pruned.source, draft)
            drop_foreign_code(draft)
            checked = check_folder(draft, model, computed, losses, sample) if sample is not None else None
            (draft / "README.md").write_text(card(checked), encoding="utf-8")
        return checked


def _write_model(model: PreTrainedModel, draft: Path, dtype: torch.dtype) -> None:
    own = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == own:
            parameter.data = parameter.data.to(dtype)
    if isinstance(model, modeling_pruned.PrunedMixin):
        name = type(model).__name__
        model.config.auto_map = {
            "AutoConfig": f"modeling_pruned.{type(model.config).__name__}",
            "AutoModel": f"modeling_pruned.{name.replace('ForCausalLM', 'Model')}",
            "AutoModelForCausalLM": f"modeling_pruned.{name}",
        }
        shutil.copyfile(modeling_pruned.__file__, draft / "modeling_pruned.py")
    model.save_pretrained(draft)
    for weights in draft.glob("*.safetensors"):  # written for its owner only, unlike all else
        shutil.copymode(draft / "config.json", weights)
