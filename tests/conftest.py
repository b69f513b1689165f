"""Fixtures that all tests share. No test reaches for the network, nor for the user's cache."""

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads it once: what is not here is refused without a wait.
os.environ["HF_HUB_OFFLINE"] = "1"

# One thread for the tiny tensors of most tests: several would wait for each other a hundred times longer than they
# work, and their number changes the last bits. torch reads the variable once, when it is imported;
# `torch.set_num_threads` would break batched LU for the rest of the process. Subprocesses, which work on real models,
# get the variable as it was.
OUTER_THREADS = os.environ.get("OMP_NUM_THREADS")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import settings
from omegaconf import OmegaConf
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from search.inputs.models import LoadedModel, random_llama
from search.paths import CACHE_VARIABLE, conf_dir
from supernet.candidates import Members, member_columns
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.prunables import member_prunables
from supernet.space import ATTENTION, MLP, Level, Space, Unit
from supernet.store import Supernet
from tests.sampling import mark_the_rest_slow

assert torch.get_num_threads() == 1, "torch was imported before tests/conftest.py could choose its threads"
del os.environ["OMP_NUM_THREADS"]
if OUTER_THREADS is not None:
    os.environ["OMP_NUM_THREADS"] = OUTER_THREADS

NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, **NO_TOKENS}
MLP_SIZE: dict[str, Any] = {"intermediate_size": 96}
SIZES: dict[str, Any] = TINY | MLP_SIZE | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
WINDOW = 5  # tokens that a sliding attention sees: less than `ids` has, so that masks matter
GEMMA: dict[str, Any] = {"sliding_window": WINDOW, "query_pre_attn_scalar": 6}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama_with_biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    # The first layers see everything, the others a window: each block has a mask of its own.
    "qwen2": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "gemma2": Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    # Windowed and other layers have rotary frequencies of their own.
    "gemma3": Gemma3TextConfig(
        **SIZES, **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW, pad_token_id=0, partial_rotary_factor=0.5),
    "opt": OPTConfig(**TINY, ffn_dim=96, num_attention_heads=4, max_position_embeddings=40),
    "gpt2": GPT2Config(**TINY, n_inner=96, n_head=4, n_positions=40),
}
MIXER_CONFIGS: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(**TINY, state_size=8, use_bias=True),
    "mamba2": Mamba2Config(**TINY, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=4, pad_token_id=0),
}
KEPT = {ATTENTION: (4, 3, 1, 0), MLP: (96, 64, 31, 0)}  # of the random supernets


# A busy machine is no failure. Fifty examples find what a hundred find, but for what nobody has thought of yet:
# `pytest --hypothesis-profile thorough` looks for that.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_slow(items)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, which all of its processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def cache(shared: Path) -> Iterator[Path]:
    """A cache of this test session's own, which subprocesses inherit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(shared / "cache"))
        yield shared / "cache"


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
def smollm2(conf: Path) -> LoadedModel:
    """SmolLM2-135M in float32. Shared by the session: not to be changed."""
    return _packaged(conf / "model" / "smollm2.yaml", "make")


@pytest.fixture(scope="session")
def gemma(conf: Path) -> LoadedModel:
    """Gemma 3 270M in float32. Shared by the session: not to be changed."""
    return _packaged(conf / "model" / "gemma3_270m.yaml", "make gemma")


def _packaged(file: Path, command: str) -> LoadedModel:
    settings = OmegaConf.load(file)
    for package in settings.packages:
        try:
            importlib.metadata.distribution(package.partition("==")[0])
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed: `{command}` does that")
    loaded: LoadedModel = instantiate(settings, dtype=torch.float32)
    return loaded


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


def random_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in which every parameter matters: norms are not 1, biases not 0."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name or ".ln_" in name), std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., PreTrainedModel]:
    """Makes a small random model of the caller's own: (name, **changes of its config) -> model."""

    def make(name: str, **changes: Any) -> PreTrainedModel:
        config = (CONFIGS | MIXER_CONFIGS)[name]
        return random_weights(type(config)(**(config.to_dict() | changes)))

    return make


@pytest.fixture(scope="session", params=CONFIGS)
def family_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A small random model of each family with attention in turn. Shared by the session: not to be changed."""
    return random_weights(CONFIGS[request.param])


@pytest.fixture(scope="session", params=MIXER_CONFIGS)
def mixer_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The same of each family that has state-space mixers and no members to remove."""
    return random_weights(MIXER_CONFIGS[request.param])


@pytest.fixture(scope="session", params=CONFIGS | MIXER_CONFIGS)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The same of each family there is."""
    return random_weights((CONFIGS | MIXER_CONFIGS)[request.param])


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """(5, 12) token ids that every random model knows."""
    return torch.randint(SIZES["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


def member_space(parts: Sequence[SubBlock], kept: Mapping[str, Sequence[int]], query_heads: bool = False) -> Space:
    """Units of all sub-blocks with these numbers of members, dense first, by kind."""
    prunables = member_prunables(parts, 1, query_heads)
    return Space(
        tuple(Unit(p.name, p.kind, p.total, tuple(Level(k, k * p.each) for k in kept[p.kind])) for p in prunables)
    )


@pytest.fixture(scope="session")
def random_supernet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedModel], Supernet]:
    """Makes a finished supernet of four levels a unit (the last drops it), with columns that no pruner would choose."""

    def make(model: PreTrainedModel) -> Supernet:
        generator = torch.Generator().manual_seed(2)
        parts = sub_blocks(model)
        space = member_space(parts, KEPT)
        supernet = Supernet.open_or_create(tmp_path_factory.mktemp("supernets"), space, {})
        for part in parts:
            candidates = []
            for count in KEPT[part.kind][1:]:
                kept = torch.randperm(part.groups.members, generator=generator)[:count].sort().values
                dense = part.weight(part.column)[:, member_columns(kept, part.groups.width)]
                noise = torch.randn(dense.shape, generator=generator)
                candidates.append(Members(kept, dense + 0.1 * noise.to(dense.dtype)))
            supernet.write(part.name, candidates, {})
        return supernet

    return make


@pytest.fixture(scope="session")
def family_supernet(family_model: PreTrainedModel, random_supernet: Callable[[PreTrainedModel], Supernet]) -> Supernet:
    """The random supernet of `family_model`. Shared by the session."""
    return random_supernet(family_model)


def allocations_of(space: Space, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random allocations of a space."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(int(torch.randint(len(u.levels), (), generator=generator)) for u in space.units) for _ in range(count)
    ]


@pytest.fixture(scope="session")
def random_allocations() -> Callable[..., Sequence[tuple[int, ...]]]:
    """Draws allocations of a space: (space, count, seed=0) -> list."""
    return allocations_of


@pytest.fixture(scope="session")
def start_search() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line of this checkout in a fresh process: (folder, *arguments, python=("-m", "search")) ->
    process.
    """

    def start(folder: Path, *arguments: str, python: Sequence[str] = ("-m", "search")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *python, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
        )

    return start


@pytest.fixture(scope="session")
def run_search(start_search: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line of this checkout in a fresh process; arguments are those of `start_search`, and seconds."""

    def run(*arguments: Any, timeout: float = 500, **options: Any) -> subprocess.CompletedProcess[str]:
        with start_search(*arguments, **options) as process:
            try:
                output = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, *output)

    return run


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust, ids, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust == "True", dtype="auto")
# else it asks for the config's code
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust == "True")
prompt = tokenizer("The for statement", return_tensors="pt").input_ids
generated = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, prompt.shape[1]:]
with torch.no_grad():
    logits = model(torch.load(ids)).logits
torch.save({
    "logits": logits,
    "class": type(model).__name__,
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "generated": len(generated),
    "text": tokenizer.decode(generated),
}, result)
assert not {"supernet", "local_prune", "search"} & sys.modules.keys()
"""


@pytest.fixture
def reload(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Loads an exported folder in a fresh process without this project, and says what it is: (folder, ids,
    trust=True).
    """

    def load(folder: Path, ids: torch.Tensor, trust: bool = True) -> dict[str, Any]:
        torch.save(ids, tmp_path / "ids.pt")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.run(
            [sys.executable, "-c", RELOAD, str(folder), str(trust), "ids.pt", "reloaded.pt"],
            cwd=tmp_path,
            env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        assert not any(word in process.stderr for word in ("MISSING", "UNEXPECTED", "MISMATCH")), process.stderr
        assert "Do you wish to run" not in process.stdout + process.stderr  # transformers would wait for an answer
        found: dict[str, Any] = torch.load(tmp_path / "reloaded.pt")
        return found

    return load
