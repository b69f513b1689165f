"""Builds that share the dense model's stream give what they give alone, and compute it once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.pruner import Pruner
from local_prune.text import dense_stream, streams
from local_prune.text.dense_stream import DenseStream, StateFile, has_room
from local_prune.text.passes import TextWalk
from supernet.models.architecture import SubBlock
from supernet.space import Unit
from supernet.store import Supernet

IDS = torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")

Built = Callable[..., Supernet]
ModelOf = Callable[..., PreTrainedModel]


def second_level(unit: Unit, index: int) -> list[float]:
    return [float(level == 1) for level in range(len(unit.levels))]


def files_of(supernet: Supernet) -> list[bytes]:
    return [file.read_bytes() for file in sorted((supernet.path / "units").iterdir())]


def stream(model: PreTrainedModel, folder: Path, keep: bool = True) -> DenseStream:
    return DenseStream(TextWalk(model, CPU), IDS, 2, folder, keep)


@pytest.mark.parametrize(
    ("family", "pruner", "fit"),
    [
        ("llama", ObsPruner(), "residual"),
        ("llama", ObsPruner(), "dense"),
        ("gpt2", SparseGptPruner(), "residual"),
        ("mamba", SparseGptPruner(), "residual"),
        ("gemma2", SparseGptPruner(), "dense"),
    ],
)
def test_builds_that_share_it_are_the_same(
    model_of: ModelOf, tmp_path: Path, built: Built, family: str, pruner: Pruner, fit: str
) -> None:
    model = model_of(family)
    alone = files_of(built(model, tmp_path / "alone", pruner, IDS, batch=2, weights=second_level, fit=fit))
    for keep in (True, False):
        shared = stream(model, tmp_path, keep)
        for number in (1, 2):
            folder = tmp_path / f"{keep} {number}"
            again = built(model, folder, pruner, IDS, batch=2, weights=second_level, fit=fit, dense=shared)
            assert files_of(again) == alone


def test_the_second_build_passes_no_text_through_the_dense_model(
    model_of: ModelOf, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passed = model_of("llama"), list[str]()
    call = SubBlock.__call__

    def counted(self: SubBlock, *arguments: Any) -> Tensor:
        passed.append(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(SubBlock, "__call__", counted)
    shared, counts = stream(model, tmp_path), list[int]()
    for number in (1, 2):
        before = len(passed)
        built(
            model, tmp_path / str(number), ObsPruner(), IDS, batch=2, weights=second_level, fit="residual", dense=shared
        )
        counts.append(len(passed) - before)
    assert counts == [3 * len(TextWalk(model, CPU).parts), 0]  # batches times sub-blocks


def test_a_disk_that_fills_up_costs_time_alone(
    model_of: ModelOf, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, write, left = model_of("llama"), dense_stream.os.pwrite, [7]

    def filling(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    settings = {"batch": 2, "weights": second_level, "fit": "residual"}
    alone = files_of(built(model, tmp_path / "alone", ObsPruner(), IDS, **settings))
    monkeypatch.setattr(dense_stream.os, "pwrite", filling)
    shared = stream(model, tmp_path)
    for number in (1, 2):
        assert files_of(built(model, tmp_path / str(number), ObsPruner(), IDS, **settings, dense=shared)) == alone


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (1, 3, 5)]
    file = StateFile(shapes, torch.bfloat16, tmp_path / "new")
    states = {(n, i): torch.randn(shapes[i], generator=generator).bfloat16() for n in (0, 1, 7) for i in (1, 0)}
    for (number, index), state in states.items():
        assert not file.has(number, index)
        file.write(number, index, state)
    for (number, index), state in states.items():
        assert file.has(number, index) and torch.equal(file.read(number, index), state)
    assert not file.has(2, 0)


def test_a_file_takes_no_more_than_it_says(model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    found = stream(model, tmp_path / "not yet" / "there")
    assert found.kept_bytes == (len(found.walk.parts) + 1) * IDS.numel() * model.config.hidden_size * 4
    assert stream(model, tmp_path, keep=False).kept_bytes == 0
    monkeypatch.setattr(dense_stream, "MOST", found.kept_bytes - 1)
    assert found.kept_bytes == 0
    assert not has_room(1 << 60, tmp_path)


@pytest.mark.parametrize("limit", [0, 2 * 2 * 16 * 96 * 4])
def test_inputs_that_are_computed_again_are_the_same(
    any_model: PreTrainedModel, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """None are kept, or those of some batches."""
    settings = {"batch": 2, "weights": second_level, "fit": "residual"}
    kept = files_of(built(any_model, tmp_path / "kept", SparseGptPruner(), IDS, **settings))
    monkeypatch.setattr(streams, "INPUTS", limit)
    assert files_of(built(any_model, tmp_path / "again", SparseGptPruner(), IDS, **settings)) == kept
