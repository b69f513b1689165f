"""A folder with a model that has nothing wrong with it."""

import shutil
from pathlib import Path

import pytest
import torch

from search.inputs.models import random_llama
from tests.search.inputs.changes import SIZES


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder: a tiny Llama with a head of its own, and the tokenizer of bytes. Not to be changed."""
    path = tmp_path_factory.mktemp("sound")
    loaded = random_llama(seed=0, **SIZES, dtype=torch.float32)
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")
