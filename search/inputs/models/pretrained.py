"""Loading a model from a local folder or from the hub.

First config.json is checked, then the headers of the weights, and only then is anything loaded. The model then holds
exactly what the checkpoint holds, or the user gets one line that says why not.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from search.errors import reason
from search.inputs.models.checks import check_config, check_dense, cleaned
from search.inputs.models.files import Source, Tensor, check_headers, elements, headers, stored_dtype
from search.inputs.models.loaded import LoadedModel, check_sizes, made_ready
from supernet.errors import InputError
from supernet.models.families import family_of_config
from supernet.system.memory import is_out_of_memory

log = logging.getLogger(__name__)

# Masks and rotary embeddings that older versions of transformers saved, and that are computed today.
COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".position_ids")
ADVICE = "give a folder with config.json, weights and tokenizer, or a hub id that this machine can reach"
MANY = 2  # a config that describes so many times the numbers that a checkpoint holds was not written for it


def from_pretrained(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, dtype: torch.dtype
) -> LoadedModel:
    """Load a model from a local folder or from the hub.

    Args:
        path: A folder (relative paths start at the working directory), or else a hub id such as "org/name".
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run Python code that the model brings along.
        dtype: The dtype to load the weights in.

    Raises:
        InputError: There is no such model, it is not complete, or it is none that can be pruned.
    """
    _check_arguments(path, revision, trust_remote_code)
    where = f"model.path={path}"
    source = Source(_local_folder(path), revision, where)
    with _translated(f"{where} cannot be loaded", ADVICE), quiet():
        config = _config(source, trust_remote_code)
        with _translated(f"{where} has a tokenizer that cannot be loaded", "give a folder with a sound tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                source.place, config=config, revision=revision, trust_remote_code=trust_remote_code
            )
        source.check_files()
        tensors = headers(source.weights(), where)
        check_headers(tensors, int(config.num_hidden_layers), family_of_config(config).blocks, where)
        if not hasattr(config, "auto_map"):
            _check_amount(config, tensors, where)
        # Any: what transformers declares leaves out the pair that output_loading_info makes of the result.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told to us, not printed
            output_loading_info=True,
        )
        model, report = loaded
        _check_report(report, where)
        _note_untied(model, where)
        return replace(_ready(model, tokenizer, path, source), stored_dtype=stored_dtype(tensors.values()))


def _ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, source: Source) -> LoadedModel:
    config = source.file("config.json")
    return made_ready(model, tokenizer, path, config.parent if config else None)


def _check_arguments(path: object, revision: object, trust_remote_code: object) -> None:
    if not isinstance(path, str) or not path:
        raise InputError(f"model.path={path} must be a folder or a hub id")
    if revision is not None and not isinstance(revision, str):
        raise InputError(
            f"model.revision={revision} must be a branch, tag or commit; quote a number: "
            f"'model.revision=\"{revision}\"'"
        )
    if not isinstance(trust_remote_code, bool):
        raise InputError(f"model.trust_remote_code={trust_remote_code} must be true or false")


def _local_folder(path: str) -> str:
    """Return the folder that a path means, after a check; the path as it is if it can only be a hub id."""
    folder = Path(path).expanduser()
    try:
        there, has_config = folder.exists(), (folder / "config.json").is_file()
    except (OSError, ValueError) as error:  # no right to look into it, a name too long, a NUL
        raise InputError(
            f"model.path={path} cannot be read ({reason(error)}); give a folder that you may read"
        ) from error
    # A hub id is "name" or "org/name"; anything that looks otherwise was meant as a path.
    if not there and (path.startswith((".", "~", "/")) or path.count("/") > 1):
        raise InputError(f"model.path={path} does not exist; give a folder with a model, or a hub id")
    if there and not has_config:
        raise InputError(f"model.path={path} has no config.json; {_instead(folder)}")
    return str(folder) if there else path


def _instead(folder: Path) -> str:
    """Return advice about a folder, or a file, that is no model of transformers."""
    if (folder / "adapter_config.json").is_file():
        return (
            "it is an adapter, no model: merge it into its model (PEFT's merge_and_unload), and give the folder of that"
        )
    if folder.suffix == ".gguf" or next(folder.glob("*.gguf"), None):
        return "it is a quantised model (GGUF): give the unquantised model it was made from"
    return "give a folder with a model in it"


def _config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the model's config, of a known family. The model's own code runs only if the user trusts it."""
    raw = source.config()
    check_dense(raw, source.where)
    if (
        trust_remote_code
        and isinstance(raw, dict)
        and isinstance(raw.get("auto_map"), dict)
        and "AutoModelForCausalLM" in raw["auto_map"]
    ):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.place, revision=source.revision, trust_remote_code=True
        )
        # The user trusts the model's code, not kernels that it fetches from others.
        config._attn_implementation = config._experts_implementation = None
    else:
        settings = cleaned(check_config(raw, source.where))
        with _translated(f"{source.where} has a config.json that does not describe a model", "correct it"):
            config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    family_of_config(config)
    check_sizes(config, f"{source.where}: config.json has ")
    return config


def _check_amount(config: PreTrainedConfig, tensors: dict[str, Tensor], where: str) -> None:
    """Raise InputError if the config describes a far larger model, before memory is taken for it."""
    with _translated(f"{where} has a config.json that does not describe a model", "correct it"), torch.device("meta"):
        described = AutoModelForCausalLM.from_config(config)
    count, held = sum(parameter.numel() for parameter in described.parameters()), elements(tensors)
    if count > MANY * held:
        raise InputError(
            f"{where}: config.json describes {count:,} parameters, and the weights hold {held:,}; give the config.json "
            "that belongs to them"
        )


def _check_report(report: Any, where: str) -> None:
    """Raise InputError if what transformers loaded is not what the checkpoint holds.

    transformers fills missing weights with random numbers, leaves out those without a place, and only warns.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        name, held, described = mismatched[0]
        raise InputError(
            f"{where}: {name} is {_by(held)} in the weights and {_by(described)} by config.json; give the config.json "
            "that belongs to them"
        )
    if report["missing_keys"]:
        raise InputError(
            f"{where} lacks {len(report['missing_keys'])} of the weights, among them {min(report['missing_keys'])}; "
            "give a complete checkpoint of a causal language model"
        )
    if unexpected := sorted(name for name in report["unexpected_keys"] if not name.endswith(COMPUTED)):
        raise InputError(
            f"{where} has {len(unexpected)} weights that its config.json has no place for, among them {unexpected[0]}; "
            "they would be lost, so give the config.json that belongs to them, or leave them out of the checkpoint"
        )
    if report.get("error_msgs"):
        raise InputError(f"{where} cannot be loaded ({report['error_msgs'][0]}); give a complete checkpoint")


def _by(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)


def _note_untied(model: PreTrainedModel, where: str) -> None:
    """Correct a config that ties head and embeddings although the checkpoint has two different weights.

    transformers loads both but leaves the config as it is, so that any model made from the config would tie them again.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False
        log.info(
            "%s: its head differs from its embeddings, so they stay two weights, although its config.json ties them",
            where,
        )


@contextmanager
def _translated(what: str, advice: str) -> Iterator[None]:
    """Turn whatever libraries raise about unexpected files, which are errors of many classes, into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what} ({_said(error)}); {advice}") from error


def _said(error: Exception) -> str:
    """Return the line of an error that says most. A bare key or number says nothing without the error's class."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # a check of a config's field, and then what was wrong with it
        return " ".join(line.strip() for line in lines[:2])
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return reason(error) if plain else f"{type(error).__name__}: {reason(error)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print while they load: our own messages say what went wrong and how to mend it."""
    levels = transformers.logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            transformers.logging.enable_progress_bar()
