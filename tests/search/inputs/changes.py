"""What can be changed of a folder with a model; each change takes the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).view(2, 12)
Change = Callable[[Path], None]


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


Q_PROJ, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
