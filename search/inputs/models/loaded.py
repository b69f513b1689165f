"""The loaded model that the rest of the project works with, its fingerprint, and the dtype of a run."""

import inspect
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from supernet.errors import InputError
from supernet.models.architecture import sub_blocks

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MANY_ZEROS = 0.01  # more than rounding to a few bits leaves by chance
# Settings that change no forward pass: where a model comes from, what wrote it, how text is generated and how the model
# was trained. The dtype is left out here as it counts with each weight.
PASSING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "use_cache",
    "initializer_range",
)
PASSING_ENDINGS = ("_token_id", "dropout", "_pdrop")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be pruned: on the CPU, in eval mode, without gradients.

    Attributes:
        model: The causal language model.
        tokenizer: Its tokenizer.
        name: What to call it in reports: a hub id, a path, or the name in the configuration.
        fingerprint: A hash of configuration, weights and code, made by the function `fingerprint`.
        folder: The folder on this machine that it was loaded from, with its licence and notices; None for a model
            that was made in memory.
        stored_dtype: The dtype of most numbers in the checkpoint, which the run's own may differ from; None for a
            model that was made in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    folder: Path | None = None
    stored_dtype: torch.dtype | None = None


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a run computes in.

    "auto" is bfloat16, except on CPUs without bfloat16 products: they would emulate it, up to ten times slower, and
    get float32.
    """
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or _multiplies_bfloat16() else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype={name} is not one that models are pruned in; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _multiplies_bfloat16() -> bool:
    """Return whether torch has matrix products in bfloat16 for this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # built without them
        return False


def made_ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, folder: Path | None = None
) -> LoadedModel:
    """Return the model ready for use: checked, in eval mode, without gradients, and with its fingerprint."""
    model.eval().requires_grad_(False)
    _check_tokenizer(model, tokenizer, name)
    _check_finite(model, name)
    _tell_zeros(model, name)
    return LoadedModel(model, tokenizer, name, fingerprint(model), folder)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of everything that determines the model's output.

    That is its configuration, the names, shapes, dtypes and bytes of its weights, and code that it brought along. The
    configuration counts because some of it, such as the base of the rotary embedding, is in no weight. The tokenizer
    does not count: all it does is to choose tokens, and those have a fingerprint of their own.
    """
    config = {key: value for key, value in model.config.to_dict().items() if not _is_passing(key)}
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # numpy knows no bfloat16, so the bytes are viewed as such; nothing is copied on the CPU.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for code in _own_code(model):
        digest.update(code)
    return digest.hexdigest()


def _is_passing(key: str) -> bool:
    return key in PASSING or key.endswith(PASSING_ENDINGS)


def _own_code(model: PreTrainedModel) -> list[bytes]:
    """Return the contents of the Python files that the model brought along; none for transformers' own classes."""
    package = type(model).__module__.rpartition(".")[0]
    if not package.startswith("transformers_modules"):
        return []
    loaded = [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{package}.")]
    return [Path(inspect.getfile(module)).read_bytes() for module in loaded if getattr(module, "__file__", None)]


def check_sizes(config: PreTrainedConfig, where: str) -> None:
    """Raise InputError for a number of layers or heads that no model of a known family can have.

    Args:
        config: The config of a known family.
        where: How the message begins, up to the name of the setting.
    """
    layers = config.num_hidden_layers
    if type(layers) is not int or layers < 1:
        raise InputError(f"{where}num_hidden_layers={layers}; a model needs at least one")
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:  # a state-space model
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    if type(heads) is not int or heads < 1 or type(groups) is not int or groups < 1:
        raise InputError(
            f"{where}num_attention_heads={heads} and num_key_value_heads={groups}; both must be at least 1"
        )
    if heads % groups:
        raise InputError(f"{where}num_key_value_heads={groups}; it must divide num_attention_heads={heads}")
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise InputError(f"{where}num_attention_heads={heads}; it must divide hidden_size={config.hidden_size}")


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise InputError if ordinary text can get token ids that the embedding has no row for.

    Special tokens may lie beyond it: Gemma 3's tokenizer has one for images behind the vocabulary of its text models.
    """
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    rows = embeddings.shape[0]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = sorted(
        (index, token) for token, index in tokenizer.get_vocab().items() if index >= rows and index not in special
    )
    if beyond:
        index, token = beyond[-1]
        raise InputError(
            f"{name}: its tokenizer has {len(beyond)} tokens that its embeddings have no row for ({token!r} is "
            f"{index}, and there are {rows} rows); give the tokenizer that belongs to the model"
        )


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise InputError(
                f"{name}: {key} holds weights that are not finite in {str(tensor.dtype)[6:]}; give a sound checkpoint"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite. It takes no memory for a second tensor, as `isfinite` would."""
    least, most = torch.aminmax(tensor)
    return bool(least.isfinite() & most.isfinite())


def _tell_zeros(model: PreTrainedModel, name: str) -> None:
    """Tell the user if many prunable weights are zero already: such a model is not as dense as it seems."""
    weights = {
        part.state_name(layer): part.weight(layer) for part in sub_blocks(model) for layer in sum(part.stages, ())
    }
    zeros = {layer: weight.numel() - int(weight.count_nonzero()) for layer, weight in weights.items()}
    share = sum(zeros.values()) / sum(weight.numel() for weight in weights.values())
    if share > MANY_ZEROS:
        most = max(zeros, key=lambda layer: zeros[layer] / weights[layer].numel())
        text = "%s: %.1f %% of the weights of its linear layers are zero already, most in %s (%.1f %%)"
        log.info(text, name, 100 * share, most, 100 * zeros[most] / weights[most].numel())
