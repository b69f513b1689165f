"""A Hugging Face folder with really smaller layers, which `from_pretrained` loads in any process.

Layers of different sizes are described by `per_layer_config` and built by one modelling file that is copied beside the
weights (`trust_remote_code=True`); where all layers are alike, the folder is of the stock architecture.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supernet import modeling_pruned
from supernet.errors import InputError


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write the model, its tokenizer and a model card; the folder appears whole or not at all, in place of an older one.

    Args:
        model: From `supernet.assemble`.
        tokenizer: The dense model's.
        folder: Where to.
        card: README.md of the folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if isinstance(model, modeling_pruned.PrunedMixin):
            name = type(model).__name__
            model.config.auto_map = {
                "AutoConfig": f"modeling_pruned.{type(model.config).__name__}",
                "AutoModel": f"modeling_pruned.{name.replace('ForCausalLM', 'Model')}",
                "AutoModelForCausalLM": f"modeling_pruned.{name}",
            }
            shutil.copy(modeling_pruned.__file__, temporary / "modeling_pruned.py")
        model.save_pretrained(temporary)
        for weights in temporary.glob("*.safetensors"):  # written for its owner only, unlike all else
            shutil.copymode(temporary / "config.json", weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {folder}: {error.strerror or error}; free some space or choose another folder") from error
