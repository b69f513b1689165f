"""The files of a model, in a local folder or on the hub, and the headers of its weights, which are read first."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file

from search.errors import reason
from search.inputs.models.checks import QUANTISED_FILES, quantised
from supernet.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt.index", "tf_model.h5", "flax_model.msgpack")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_JSON = 1 << 26  # bytes; the index of the largest models has a tenth of that
KEPT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # an export can have these, too
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that weights can have


@dataclass(frozen=True)
class Tensor:
    """Dtype and shape of a tensor, as the header of a weights file states them."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where a model's files are: in a local folder, or in a repository on the hub.

    Attributes:
        place: The folder or the hub id.
        revision: Branch, tag or commit on the hub; None for the newest.
        where: What to call the model in messages.
    """

    place: str
    revision: str | None
    where: str

    def file(self, name: str) -> Path | None:
        """Return the local path of a file, downloaded if necessary; None if the model has no such file."""
        found = cached_file(
            self.place,
            name,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # what was downloaded before is enough
        )
        return Path(found) if found else None

    def config(self) -> Any:
        """Return the contents of config.json, the one file that every model has."""
        # Unlike `file`, this raises where the file is missing and says why: no hub, no such repository, no permission.
        cached_file(self.place, "config.json", revision=self.revision)
        return self.json("config.json")

    def json(self, name: str) -> Any:
        """Return the contents of a JSON file; None if the model has no such file."""
        path = self.file(name)
        if path is None:
            return None
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{self.where} has a {name} of {path.stat().st_size:,} bytes; a sound one has far fewer")
        try:
            with path.open(encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{self.where} has a {name} that cannot be read ({reason(error)}); give a sound one"
            ) from error

    def check_files(self) -> None:
        """Raise InputError if files beside the weights make the model something else: adapters, quantisation."""
        if self.file("adapter_config.json"):
            raise InputError(
                f"{self.where} has an adapter (adapter_config.json); merge it into the model first (PEFT's "
                "merge_and_unload), save that, and give its folder"
            )
        for name, method in QUANTISED_FILES.items():
            if self.file(name):
                raise quantised(self.where, f"{method}, {name}")

    def weights(self) -> list[Path]:
        """Return the safetensors files with the weights; InputError if some are missing or the weights are pickled."""
        whole = self.file(WEIGHTS)
        if whole is not None:
            return [whole]
        index = self.json(INDEX)
        if index is None:
            raise self._no_weights()
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{self.where} has a {INDEX} without a weight_map; give a complete checkpoint")
        found = []
        for name in sorted(set(names.values())):
            # A name with a folder in it would make us read files from elsewhere.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"{self.where} has a {INDEX} that names {name!r}; it must name .safetensors files beside it"
                )
            path = self.file(name)
            if path is None:
                raise InputError(f"{self.where} lacks {name}, which its {INDEX} names; give a complete checkpoint")
            found.append(path)
        return found

    def _no_weights(self) -> InputError:
        folder = Path(self.place)
        names = (
            sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [n for n in PICKLES if self.file(n)]
        )
        if pickles := [name for name in names if name in PICKLES or name.endswith(PICKLED)]:
            return InputError(
                f"{self.where} has its weights in {pickles[0]}, which is not read: such files can run code; if you "
                "trust it, load it elsewhere with transformers and write it anew with save_pretrained, which makes "
                "model.safetensors"
            )
        if ggufs := [name for name in names if name.endswith(".gguf")]:
            return quantised(self.where, f"GGUF, {ggufs[0]}")
        return InputError(
            f"{self.where} has no weights: no file named {WEIGHTS} or {INDEX}; give a folder with config.json, weights "
            "and tokenizer"
        )


def headers(files: list[Path], where: str) -> dict[str, Tensor]:
    """Return dtype and shape of all tensors in the weights files, by name. The tensors themselves are not read."""
    found: dict[str, Tensor] = {}
    for path in files:
        if not os.access(path, os.R_OK):
            raise InputError(f"{where}: {path.name} cannot be read (permission denied); make it readable")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    found[name] = Tensor(part.get_dtype(), tuple(part.get_shape()))
        # safetensors' own error, which is no OSError, or whatever a damaged header leads to
        except Exception as error:
            raise InputError(
                f"{where}: {path.name} cannot be read as safetensors ({reason(error)}); it is damaged or cut off, so "
                "fetch it again"
            ) from error
    return found


def check_headers(tensors: Mapping[str, Tensor], layers: int, blocks: str, where: str) -> None:
    """Raise InputError if weights are no floats, or if they hold another number of blocks than the config says.

    Args:
        tensors: All tensors of the checkpoint, by name.
        layers: Number of blocks that the config describes.
        blocks: Path of the list of blocks in the model, such as "model.layers".
        where: What to call the model in messages.
    """
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype.startswith("F8") or (name.endswith(("weight", "weight_packed")) and tensor.dtype not in FLOATS):
            raise quantised(where, f"{name} is of {tensor.dtype}")
    *outer, inner = blocks.split(".")
    # The checkpoint of a model without a head may lack the first parts of the path.
    numbers = re.compile("".join(rf"(?:{part}\.)?" for part in outer) + rf"{inner}\.(\d+)\.")
    held = 1 + max((int(match[1]) for name in tensors if (match := numbers.match(name))), default=-1)
    if held != layers:
        raise InputError(
            f"{where}: config.json describes {layers} blocks, and the weights are of {held}; "
            + ("give a complete checkpoint" if held < layers else "give the config.json that belongs to them")
        )


def stored_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype that most of the numbers have; None if an export cannot be written in it."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + prod(tensor.shape)
    return KEPT_DTYPES.get(max(counts, key=lambda name: counts[name])) if counts else None


def elements(tensors: Mapping[str, Tensor]) -> int:
    """Return how many numbers all the tensors hold together."""
    return sum(prod(tensor.shape) for tensor in tensors.values())
