"""What is loaded is what is in the checkpoint, or one line says why not: bad, hostile and quantised folders."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from search.inputs.models import from_pretrained
from supernet.errors import InputError
from tests.search.inputs.changes import (
    HEAD,
    IDS,
    Q_PROJ,
    Change,
    config,
    element,
    pickled,
    sharded,
    tensor,
    text,
    weights,
)


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
