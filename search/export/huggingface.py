"""A Hugging Face folder with really smaller layers, which `from_pretrained` loads in any process.

Layers of different sizes are described by `per_layer_config` and built by one modelling file that is copied beside the
weights (`trust_remote_code=True`); where all layers are alike, the folder is of the stock architecture.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from search.export.carried import carry, drop_foreign_code
from search.export.check import Checked, Sample, check_assembled, check_folder
from supernet.errors import InputError
from supernet.models import modeling_pruned

Card = Callable[[Checked | None], str]  # README.md, from what the check found


@dataclass(frozen=True)
class Wanted:
    """How a model is to be exported.

    Attributes:
        dtype: Of the weights in the file; None for that of the weights in memory.
        sample: What the folder is checked with; None for no check.
        source: The dense model's folder, whose licence and tokenizer files are carried along.
    """

    dtype: torch.dtype | None = None
    sample: Sample | None = None
    source: Path | None = None


PLAIN = Wanted()


@torch.no_grad()
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its weights rounded to what a file of another dtype can hold, so that what is measured is what is
    written.

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


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: Card, wanted: Wanted = PLAIN
) -> Checked | None:
    """Write the model, its tokenizer and a model card; the folder appears whole or not at all, in place of an older
    one.

    Args:
        model: From `supernet.models.assemble`, and `rounded` to the dtype that is wanted, which it is cast to here: its
            last use.
        tokenizer: The dense model's.
        folder: Where to.
        card: README.md of the folder.
        wanted: How.
    """
    draft, older = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    sample, dtype = wanted.sample, model.dtype
    losses = check_assembled(model, sample) if sample is not None else []
    try:
        _clear(folder, draft, older)
        draft.mkdir(parents=True)
        _write_model(model, draft, wanted.dtype or dtype)
        tokenizer.save_pretrained(draft)
        carry(wanted.source, draft)
        drop_foreign_code(draft)
        checked = check_folder(draft, model, dtype, losses, sample) if sample is not None else None
        (draft / "README.md").write_text(card(checked), encoding="utf-8")
        _swap(draft, folder, older)
        return checked
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers library raises for a file that it cannot write
            raise _cannot_write(folder, error) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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


def _clear(folder: Path, draft: Path, older: Path) -> None:
    """Take away what a process that was killed left behind; an older export that it had set aside comes back."""
    shutil.rmtree(draft, ignore_errors=True)
    if older.exists() and not folder.exists():
        os.replace(older, folder)
    shutil.rmtree(older, ignore_errors=True)


def _swap(draft: Path, folder: Path, older: Path) -> None:
    """Put the draft in the place of the folder; what was there is gone only when the draft is in place."""
    if folder.exists():
        os.replace(folder, older)
    try:
        os.replace(draft, folder)
    except OSError:
        if older.exists():
            os.replace(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _cannot_write(folder: Path, error: Exception) -> InputError:
    why = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"cannot write {folder}: {why}; free some space or choose another folder")
