"""Loading a model from a local folder, or from the hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from search.errors import reason
from search.models.loaded import LoadedModel, made_ready
from supernet.errors import InputError


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
    return made_ready(model, tokenizer, path)


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
