"""Checks of a model's config.json, made before a model is built from it and before any weight is read.

The file comes from strangers. Nothing in it may run code, fetch kernels from the hub, or make this process build a
billion layers.
"""

from collections.abc import Iterator
from typing import Any

from supernet.errors import InputError
from supernet.models.families import check_known

# Where a quantised checkpoint says so; MLX calls it "quantization".
QUANTISED = ("quantization_config", "compression_config", "quantization")
# The same in files of their own: NVIDIA's ModelOpt, and what older AutoGPTQ and AutoAWQ wrote.
QUANTISED_FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
LARGEST = 1 << 24  # for any size in a config: no model has a vocabulary or an MLP of 17 million
DEEPEST = 10_000  # blocks
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "ffn_dim", "word_embed_proj_dim", "state_size", "num_heads",
    "n_groups", "expand", "conv_kernel", "d_inner",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer")
# Settings that a loaded model must not take from the file: code and kernels, files that replace the usual ones, the
# form of what forward returns, and labels, which transformers expands to a dictionary of any size.
DROPPED = (
    "auto_map", "configuration_files", "transformers_weights", "_name_or_path", "_commit_hash", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "torchscript", "num_labels", "id2label", "label2id",
    "problem_type", "dtype", "torch_dtype",
)  # fmt: skip


def check_config(raw: object, where: str) -> dict[str, Any]:
    """Return the contents of a config.json if they describe a dense model of a known family.

    Args:
        raw: What the file holds.
        where: What to call the model in messages.

    Raises:
        InputError: They do not; the message says what would be right.
    """
    if not isinstance(raw, dict):
        raise InputError(
            f"{where} has a config.json that holds no object {{...}}; give the config.json of a language model"
        )
    check_dense(raw, where)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(f"{where} has a config.json without a model_type; give the config.json of a language model")
    check_known(model_type)
    for key in SIZES:
        value = raw.get(key)
        most = DEEPEST if key in LAYERS else LARGEST
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise InputError(
                f"{where} has {key}={shown(value)} in its config.json; it must be a whole number from 1 to {most}"
            )
    return raw


def check_dense(raw: object, where: str) -> None:
    """Raise InputError if a config, or a config inside it, says that weights are quantised or layers pruned."""
    for inner in _objects(raw):
        for key in QUANTISED:
            if inner.get(key):
                raise quantised(where, _method(inner[key]))
        if "per_layer_config" in inner:
            raise InputError(
                f"{where} is pruned already: its layers differ in size; prune the dense model it was made from"
            )


def quantised(where: str, method: str) -> InputError:
    """Return the error for a quantised checkpoint, where `method` is what quantised it."""
    return InputError(
        f"{where} is quantised ({method}): what is pruned are the weights themselves, so give the unquantised model it "
        "was made from"
    )


def cleaned(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json without those that a stranger must not decide (`DROPPED`)."""
    return {
        key: _cleaned(value) for key, value in raw.items() if key not in DROPPED + QUANTISED and not _names_code(key)
    }


def shown(value: object) -> str:
    """Return a value from a file as text that is short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cleaned(value: Any) -> Any:
    return (
        {key: _cleaned(inner) for key, inner in value.items() if not _names_code(key)}
        if isinstance(value, dict)
        else value
    )


def _names_code(key: str) -> bool:
    """Return whether a setting can name an implementation on the hub ("org/kernel"). This project chooses its own."""
    return (
        key.endswith(("_implementation", "_implementation_internal")) or "kernel_config" in key or "use_kernel" in key
    )


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """Yield every object inside a JSON value, beginning with the value itself."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


def _method(settings: object) -> str:
    """Return the name that a quantisation gives itself in its settings, with its bits."""
    found = settings if isinstance(settings, dict) else {}
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes, 4 bits" if found.get("load_in_4bit") else "bitsandbytes, 8 bits"
    method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
    bits = found.get("bits") or found.get("w_bit")
    return (str(method)[:40] if method else "by its config.json") + (f", {str(bits)[:4]} bits" if bits else "")
