"""What is loaded is what is in the checkpoint, or one line says why not: bad, hostile and quantised folders."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from search.inputs.models import from_pretrained, random_llama
from search.inputs.models.checks import check_config
from supernet.errors import InputError
from supernet.models.families import FAMILIES, family_of_config
from supernet.models.forward import check_walk

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).view(2, 12)
Change = Callable[[Path], None]


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


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        kept = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(kept | changes))

    return change


def text(name: str, contents: str) -> Change:
    return lambda folder: (folder / name).write_text(contents) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


def tensor(name: str, value: torch.Tensor | None) -> Change:
    return weights(lambda tensors: tensors.pop(name) if value is None else tensors.__setitem__(name, value))


def pickled(name: str) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / name)

    return change


def element(name: str, value: float) -> Change:
    return weights(lambda tensors: tensors[name].view(-1).__setitem__(3, value))


def sharded(shard: str) -> Change:
    def change(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def tokens_beyond(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def gguf_only(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_bytes(b"GGUF")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


Q_PROJ, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
BAD: dict[str, tuple[Change, str]] = {
    # Quantised, each as its own tools write it.
    "fp8": (config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}), "quantised (fp8)"),
    "bnb4": (config(quantization_config={"load_in_4bit": True}), "quantised (bitsandbytes, 4 bits)"),
    "bnb8": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "(bitsandbytes, 8 bits)",
    ),
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised (gptq, 4 bits): what is pruned",
    ),
    "awq": (config(quantization_config={"quant_method": "awq"}), "give the unquantised model it was made from"),
    "mxfp4": (config(model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"}), "quantised (mxfp4)"),
    "compressed": (config(compression_config={"quant_method": "compressed-tensors"}), "quantised (compressed-tensors)"),
    "nested": (config(text_config={"quantization_config": {"quant_method": "hqq"}}), "quantised (hqq)"),
    "mlx": (config(quantization={"group_size": 64, "bits": 4}), "quantised (by its config.json, 4 bits)"),
    "modelopt": (text("hf_quant_config.json", "{}"), "quantised (ModelOpt, hf_quant_config.json)"),
    "old gptq": (text("quantize_config.json", "{}"), "quantised (GPTQ, quantize_config.json)"),
    "gguf": (gguf_only, "is a quantised model (GGUF)"),
    "int8": (tensor(Q_PROJ, torch.ones(16, 16, dtype=torch.int8)), f"quantised ({Q_PROJ} is of I8)"),
    "float8": (tensor(Q_PROJ, torch.ones(16, 16).to(torch.float8_e4m3fn)), f"quantised ({Q_PROJ} is of F8_E4M3)"),
    # Weights and config that do not belong together.
    "bias": (
        tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(16)),
        "no place for, among them model.layers.0.self_",
    ),
    "attention bias": (
        tensor("model.layers.0.self_attn.bias", torch.ones(16)),
        "among them model.layers.0.self_attn.bias",
    ),
    "value head": (
        tensor("v_head.weight", torch.ones(16)),
        "no place for, among them v_head.weight; they would be lost",
    ),
    "no head": (tensor(HEAD, None), "lacks 1 of the weights, among them lm_head.weight"),
    "fewer blocks": (config(num_hidden_layers=1), "describes 1 blocks, and the weights are of 2"),
    "more blocks": (
        config(num_hidden_layers=5),
        "describes 5 blocks, and the weights are of 2; give a complete checkpoint",
    ),
    "wider mlp": (config(intermediate_size=32), "is 16 x 24 in the weights and 16 x 32 by config.json"),
    "narrower": (config(hidden_size=8), "in the weights and"),
    "vocabulary": (config(vocab_size=300), "is 257 x 16 in the weights and 300 x 16 by config.json"),
    "far wider": (config(intermediate_size=1 << 24), "config.json describes 1,6"),
    "nan": (element(Q_PROJ, float("nan")), f"{Q_PROJ} holds weights that are not finite in float32"),
    "infinite": (element(HEAD, float("-inf")), f"{HEAD} holds weights that are not finite"),
    "token ids": (
        tokens_beyond,
        "has 1 tokens that its embeddings have no row for ('zz' is 300, and there are 257 rows)",
    ),
    # Files that cannot be read, or must not.
    "bin": (
        pickled("pytorch_model.bin"),
        "has its weights in pytorch_model.bin, which is not read: such files can run code",
    ),
    "pt": (pickled("consolidated.00.pth"), "write it anew with save_pretrained, which makes model.safetensors"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no weights: no file named model.safetensors",
    ),
    "shard above": (sharded("../model/model-1.safetensors"), "it must name .safetensors files beside it"),
    "shard absent": (
        sharded("model-2.safetensors"),
        "lacks model-2.safetensors, which its model.safetensors.index.json names",
    ),
    "index list": (
        lambda f: (sharded("")(f), text("model.safetensors.index.json", "[]")(f)) and None,
        "without a weight_map",
    ),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 999), "cannot be read as safetensors"),
    "no safetensors": (text("model.safetensors", "pickle"), "cannot be read as safetensors"),
    "adapter": (text("adapter_config.json", "{}"), "has an adapter (adapter_config.json); merge it"),
    "adapter only": (adapter_only, "is an adapter, no model: merge it"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tok*")] and None,
        "has a tokenizer that cannot be loaded (",
    ),
    "tokenizer list": (text("tokenizer.json", "[]"), "has a tokenizer that cannot be loaded ("),
    "tokenizer config list": (text("tokenizer_config.json", "[]"), "has a tokenizer that cannot be loaded ("),
    "tokenizer deep": (text("tokenizer_config.json", DEEP), "has a tokenizer that cannot be loaded ("),
    "generation list": (text("generation_config.json", "[]"), "cannot be loaded"),
    # Configs.
    "list": (text("config.json", "[1]"), "has a config.json that holds no object"),
    "null": (text("config.json", "null"), "has a config.json that holds no object"),
    "cut config": (text("config.json", '{"model_type":'), "has a config.json that cannot be read (Expecting value"),
    "binary config": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00") and None,
        "cannot be read ('utf-8'",
    ),
    "deep config": (text("config.json", DEEP), "has a config.json that cannot be read (maximum recursion depth"),
    "no type": (config(model_type=None), "has a config.json without a model_type"),
    "type list": (config(model_type=["llama"]), "has a config.json without a model_type"),
    "unknown": (config(model_type="novel"), "the model's architecture 'novel' is not known"),
    "huge config": (
        lambda folder: os.truncate(folder / "config.json", 1 << 27),
        "has a config.json of 134,217,728 bytes",
    ),
    "pruned, trusted": (config(per_layer_config={}, auto_map={"AutoModelForCausalLM": "own.M"}), "is pruned already"),
    "pruned": (config(per_layer_config={}), "is pruned already"),
    "10^9 layers": (config(num_hidden_layers=10**9), "has num_hidden_layers=1000000000 in its config.json; it must be"),
    "no layers": (
        config(num_hidden_layers=0),
        "has num_hidden_layers=0 in its config.json; it must be a whole number from 1",
    ),
    "-1 layers": (config(num_hidden_layers=-1), "has num_hidden_layers=-1 in its config.json"),
    "layers text": (config(num_hidden_layers="2"), "has num_hidden_layers='2' in its config.json"),
    "layers float": (config(num_hidden_layers=2.5), "has num_hidden_layers=2.5 in its config.json"),
    "layers true": (config(num_hidden_layers=True), "has num_hidden_layers=True in its config.json"),
    "no heads": (config(num_attention_heads=0), "has num_attention_heads=0 in its config.json"),
    "groups": (config(num_key_value_heads=3), "num_key_value_heads=3; it must divide num_attention_heads=4"),
    "head list": (config(head_dim=[4]), "has head_dim=[4] in its config.json"),
    "huge vocabulary": (config(vocab_size=10**15), "has vocab_size=1000000000000000 in its config.json"),
    "activation": (
        config(hidden_act="magic"),
        "config.json that does not describe a model (KeyError: 'magic'); correct it",
    ),
    "rope": (config(rope_parameters=5), "has a config.json that does not describe a model ("),
    "rope type": (
        config(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
        "has a config.json that does not describe a model (",
    ),
    "epsilon": (config(rms_norm_eps="small"), "has a config.json that does not describe a model ("),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_told_in_one_line(case: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(InputError) as caught:
        from_pretrained(str(folder), dtype=torch.float32)
    line = str(caught.value)
    assert message in line and "\n" not in line and len(line) < 700
    assert case in ("unknown", "groups") or str(folder) in line
    assert capfd.readouterr() == ("", "")  # nothing above it


HARMLESS: dict[str, Change] = {
    "computed": weights(
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "model.position_ids": torch.ones(4)}
        )
    ),
    "labels": config(num_labels=10**12),
    "returns": config(return_dict=False, output_hidden_states=True, output_attentions=True, torchscript=True),
    "null": config(quantization_config=None, compression_config={}, auto_map=None, num_key_value_heads=2),
    "kernels": config(
        attn_implementation="stranger/kernel",
        _attn_implementation="stranger/kernel",
        experts_implementation="stranger/kernel",
        _experts_implementation_internal="stranger/kernel",
        use_kernels=True,
    ),
    "elsewhere": config(
        configuration_files=["config.4.0.json"], transformers_weights="other.safetensors", _name_or_path="x/y"
    ),
    "dtype": config(dtype="no_such_dtype", torch_dtype="int8"),
    "training": config(use_cache=False, initializer_range=0.5, attention_dropout=0.5, eos_token_id=4, pad_token_id=7),
    "generation": text("generation_config.json", json.dumps({"custom_generate": "stranger/code", "max_length": 5})),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_makes_no_difference_is_let_pass(case: str, folder: Path, sound: Path) -> None:
    HARMLESS[case](folder)
    loaded, expected = (
        from_pretrained(str(folder), dtype=torch.float32),
        from_pretrained(str(sound), dtype=torch.float32),
    )
    assert loaded.fingerprint == expected.fingerprint
    assert torch.equal(loaded.model(IDS).logits, expected.model(IDS).logits)
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_strangers_code_is_not_run_and_its_name_is_not_carried_on(folder: Path) -> None:
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    config(auto_map=names)(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    loaded = from_pretrained(str(folder), dtype=torch.float32)
    assert not (folder / "ran").exists()
    assert not hasattr(loaded.model.config, "auto_map")
    assert type(loaded.model) is LlamaForCausalLM


CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
# {}
"""


def test_trusted_code_is_part_of_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    config(auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})(folder)
    found = []
    for version in "ab":
        (folder / "own.py").write_text(CODE.format(version))
        loaded = from_pretrained(str(folder), trust_remote_code=True, dtype=torch.float32)
        assert type(loaded.model).__name__ == "OwnModel"
        found.append(loaded.fingerprint)
    assert found[0] != found[1]
    assert from_pretrained(str(folder), trust_remote_code=False, dtype=torch.float32).fingerprint not in found


def test_a_model_of_the_hub(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies in the hub's cache, without a network."""
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    snapshot = Path(shutil.copytree(sound, repository / "snapshots" / ("0" * 40)))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = from_pretrained("org/name", dtype=torch.float32)
    assert (loaded.name, loaded.folder) == ("org/name", snapshot)
    assert loaded.fingerprint == from_pretrained(str(sound), dtype=torch.float32).fingerprint
    (snapshot / "model.safetensors").unlink()  # not downloaded yet: the config decides
    config(quantization_config={"quant_method": "gptq"})(snapshot)
    with pytest.raises(InputError, match=r"model.path=org/name is quantised \(gptq\)"):
        from_pretrained("org/name", dtype=torch.float32)


def saved(folder: Path, **changes: Any) -> Path:
    """The same folder with a model of another config."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES | changes)).save_pretrained(folder)
    return folder


def test_a_head_that_differs_from_tied_embeddings_stays(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, tie_word_embeddings=True)
    head = torch.randn(257, 16)
    tensor(HEAD, head)(folder)
    with caplog.at_level(logging.INFO):
        model = from_pretrained(str(folder), dtype=torch.float32).model
    assert "its head differs from its embeddings" in caplog.text
    assert torch.equal(model.lm_head.weight, head)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as whatever copies a model does
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, head) and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tied_head_that_is_in_the_file_too_stays_tied(folder: Path) -> None:
    saved(folder, tie_word_embeddings=True)
    weights(lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()}))(folder)
    model = from_pretrained(str(folder), dtype=torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_an_old_gpt2_with_masks_in_its_file(folder: Path) -> None:
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(folder)
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    check_walk(from_pretrained(str(folder), dtype=torch.float32).model)


def test_zeros_that_are_there_already_are_counted_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ][:12] = 0
        tensors["model.layers.0.mlp.down_proj.weight"][:, ::2] = 0
        tensors["model.embed_tokens.weight"][:100] = 0  # no linear layer of a block

    with caplog.at_level(logging.INFO):
        from_pretrained(str(folder), dtype=torch.float32)
        assert "zero already" not in caplog.text
        weights(halve)(folder)
        from_pretrained(str(folder), dtype=torch.float32)
    told = (
        "10.0 % of the weights of its linear layers are zero already, most in model.layers.1.self_attn.q_proj (75.0 %)"
    )
    assert told in caplog.text


def test_the_folder_is_known(folder: Path) -> None:
    assert from_pretrained(str(folder), dtype=torch.float32).folder == folder


def test_special_tokens_may_lie_beyond_the_embeddings(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(from_pretrained(str(folder), dtype=torch.float32).tokenizer) == 258


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(permission denied\); make it readable"):
        from_pretrained(str(folder), dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": 5}, "model.path=5 must be a folder or a hub id"),
        ({"path": "\0"}, "cannot be"),
        ({"path": "x" * 5000}, "cannot be read"),
        ({"path": "a/b", "revision": 3}, "model.revision=3 must be a branch"),
        ({"path": "a/b", "trust_remote_code": "yes"}, "model.trust_remote_code=yes must be true or false"),
    ],
)
def test_arguments_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_pretrained(**settings, dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_key_value_heads": 3}, "model.num_key_value_heads=3 must divide model.num_attention_heads=4"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            "model.num_attention_heads=3 must divide model.hidden_size=16",
        ),
        ({"num_hidden_layers": 0}, "model.num_hidden_layers=0 must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers=1000000000 must be a whole number from 1 to 1,000"),
        ({"hidden_size": "16"}, "model.hidden_size=16 must be a whole number"),
        ({"intermediate_size": 2.5}, "model.intermediate_size=2.5 must be a whole number"),
        ({"seed": -1}, "model.seed=-1 must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "model.tie_word_embeddings=yes must be true or false"),
        ({"hidden_size": 12}, "into heads of an even size"),
    ],
)
def test_a_random_llama_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_llama(**{"seed": 0} | SIZES | settings, dtype=torch.float32)


def test_every_causal_language_model_of_transformers_is_known_or_told() -> None:
    """Of the config alone: multimodal ones have no vocab_size, nor anything else that a text model has."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raw = {"model_type": model_type}
        if model_type in FAMILIES:
            assert check_config(raw, "model") == raw
            continue
        with pytest.raises(InputError, match=f"architecture '{model_type}' is not known"):
            check_config(raw, "model")
        with pytest.raises(InputError, match=f"architecture '{model_type}' is not known"):
            family_of_config(SimpleNamespace(model_type=model_type))
    assert set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_multimodal_model_is_told_before_its_config_is_used() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3"))
    with pytest.raises(InputError, match="architecture 'gemma3' is not known"):
        check_walk(model)
