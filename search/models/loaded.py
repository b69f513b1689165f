"""A model as the rest of the project gets it, whatever it came from; its fingerprint, and the dtype of a run."""

import json
from dataclasses import dataclass

import torch
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supernet.errors import InputError


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be pruned: on the CPU, in eval mode, without gradients.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        name: what to call it in reports: a hub id, a path, or the name in the configuration.
        fingerprint: a hash of configuration, weights and vocabulary size; see `fingerprint`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a run computes in: `auto` is bfloat16, but float32 on CPUs that would emulate it, up to ten times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or _multiplies_bfloat16() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype={name} is not a float dtype of torch; use auto, bfloat16, float16 or float32")
    return dtype


def _multiplies_bfloat16() -> bool:
    """Whether torch has matrix products in bfloat16 for this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # built without them
        return False


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that determines the model's output: configuration, names, shapes, dtypes and bytes of the
    weights, and the size of the vocabulary.

    The configuration counts because some of it (the base of the rotary embedding, say) is in no weight. Where
    the model was loaded from does not count.
    """
    config = model.config.to_dict()
    # Where it comes from and which version wrote it; the dtype counts with each weight.
    for passing in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(passing, None)
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # numpy knows no bfloat16, so the bytes are viewed as such; nothing is copied on the CPU.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(str(len(tokenizer)).encode())
    return digest.hexdigest()


def made_ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedModel:
    """The model in eval mode and without gradients, with its fingerprint."""
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, name, fingerprint(model, tokenizer))
