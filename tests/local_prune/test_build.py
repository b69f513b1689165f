"""A build can be interrupted anywhere, does with little memory, and says what is wrong."""

import copy
import errno
import gc
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from local_prune.methods.amp import AmpPruner
from local_prune.methods.apt import AptPruner
from local_prune.methods.bonsai import BonsaiPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.magnitude import MagnitudePruner
from local_prune.methods.magnitude_sp import MagnitudeMembersPruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.rtn import RtnPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.taylor import TaylorPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.methods.wanda_sp import WandaSpPruner
from local_prune.pruner import FITS, Calibration, Pruner, Task
from local_prune.text import dense_stream, streams
from search.inputs.models import LoadedModel
from supernet.candidates import Candidate
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.space import Unit
from supernet.store import Supernet

IDS = torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(3))

Built = Callable[..., Supernet]
ModelOf = Callable[..., PreTrainedModel]


@pytest.fixture
def model(tiny_llama: LoadedModel) -> PreTrainedModel:
    return tiny_llama.model


def dense(unit: Unit, index: int) -> list[float]:
    """No accumulation."""
    return [float(level == 0) for level in range(len(unit.levels))]


@dataclass(frozen=True)
class NoPruner(ObsPruner):
    """Must not be asked for anything."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        raise AssertionError(task.where)


def unit_files(supernet: Supernet) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((supernet.path / "units").iterdir())}


class InterruptionError(Exception):
    """As by a signal."""


@contextmanager
def writes(most: int | None = None) -> Any:
    """The units that a build within writes; it is interrupted before it writes more than `most`."""
    write, names = Supernet.write, list[str]()

    def noting(supernet: Supernet, name: str, *arguments: Any) -> None:
        if len(names) == most:
            raise InterruptionError
        names.append(name)
        write(supernet, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supernet, "write", noting)
        yield names


@pytest.mark.sampled
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("pruner", "units"),
    [
        (ObsPruner(), 0),
        (ObsPruner(), 1),
        (ObsPruner(), 4),
        (ObsPruner(), 5),
        *((SparseGptPruner(), n) for n in (1, 4, 12)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_an_interrupted_build_ends_as_an_undisturbed_one(
    model_of: ModelOf, tmp_path: Path, built: Built, fit: str, pruner: Pruner, units: int
) -> None:
    model = model_of("llama")
    expected = unit_files(built(model, tmp_path / "undisturbed", pruner, IDS, fit=fit))
    with writes(units), pytest.raises(InterruptionError):
        built(model, tmp_path / "interrupted", pruner, IDS, fit=fit)
    with writes() as names:
        supernet = built(model, tmp_path / "interrupted", pruner, IDS, fit=fit)
    assert names == [unit.name for unit in supernet.space.units[units:]]  # what was there is not built again
    assert supernet.complete
    assert unit_files(supernet) == expected


def test_a_finished_supernet_is_not_touched(model: PreTrainedModel, tmp_path: Path, built: Built) -> None:
    first = built(model, tmp_path, ObsPruner(), IDS)
    model.model.embed_tokens.weight.data.fill_(torch.nan)  # would be seen by any pass over the text
    again = built(model, tmp_path, NoPruner(), IDS)
    assert unit_files(again) == unit_files(first)


def test_a_build_finds_what_another_process_has_finished_meanwhile(
    model: PreTrainedModel, tmp_path: Path, built: Built
) -> None:
    """The loser of a race opened the supernet before the winner had written anything."""
    refresh, races = Supernet.refresh, list[Supernet]()

    def too_early(supernet: Supernet) -> None:
        if races or supernet.path.exists():
            refresh(supernet)

    with pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def waiting(supernet: Supernet) -> Any:
            patch.undo()
            races.append(built(model, tmp_path, ObsPruner(), IDS))
            yield

        patch.setattr(Supernet, "building", waiting)
        patch.setattr(Supernet, "refresh", too_early)
        supernet = built(model, tmp_path, NoPruner(), IDS)
    assert supernet.complete
    assert torch.equal(supernet.candidate(0, 1).weight, races[0].candidate(0, 1).weight)


def test_the_model_stays_as_it_was(model: PreTrainedModel, tmp_path: Path, built: Built) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    built(model, tmp_path, FlapPruner(), IDS)
    built(model, tmp_path, SparseGptPruner(), IDS, fit="residual")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_is_drawn_over_all_sub_blocks(model: PreTrainedModel, tmp_path: Path, built: Built) -> None:
    drawn: list[str] = []

    def track(places: Sequence[Any], title: str) -> Iterable[Any]:
        for place in places:
            drawn.append(f"{title} {place.part.name}")
            yield place

    built(model, tmp_path, ObsPruner(), IDS, weights=dense, track=track)
    assert drawn == [f"build {part.name}" for part in sub_blocks(model)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "dens"}, "prune.fit=dens is not known; choose one of pruned, dense, residual"),
        ({"batch": 0}, "prune.batch=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(IDS, **settings)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("pruner", [ObsPruner(), SparseGptPruner()], ids=["members", "weights"])
def test_bfloat16(model: PreTrainedModel, tmp_path: Path, built: Built, pruner: Pruner, fit: str) -> None:
    supernet = built(model.bfloat16(), tmp_path, pruner, IDS, fit=fit)
    candidate = supernet.candidate(7, 2)
    assert candidate.weight.dtype == torch.bfloat16
    assert all(0 <= e < 1 for unit in supernet.manifest["units"].values() for e in unit["errors"])


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/activations-" in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says which files are mapped")
@pytest.mark.parametrize("fit", FITS)
def test_a_build_with_activations_on_disk_is_the_same(
    model_of: ModelOf, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    model = model_of("llama")
    expected = unit_files(built(model, tmp_path / "memory", ObsPruner(), IDS, fit=fit))
    for module in (streams, dense_stream):
        monkeypatch.setattr(module, "available", lambda: 0)
    gc.collect()
    others = mapped_files()  # that an earlier test's failure, say, still holds
    mapped: list[int] = []

    def track(items: Sequence[Any], title: str) -> Iterable[Any]:
        for item in items:
            mapped.append(len(mapped_files()) - len(others))
            assert not list(tmp_path.rglob("activations-*"))  # no name, so nothing stays after a crash either
            yield item

    assert unit_files(built(model, tmp_path / "disk", ObsPruner(), IDS, fit=fit, track=track)) == expected
    assert mapped == [1 if fit == "pruned" else 2] * 6
    gc.collect()
    assert mapped_files() == others


def test_a_disk_without_space_for_activations_is_told(
    model: PreTrainedModel, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(streams, "available", lambda: 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        InputError, match=r"^cannot write 0\.0 GB of activations to .*: No space left on device; use fewer seq"
    ) as told:
        built(model, tmp_path, ObsPruner(), IDS)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("activations-*"))


SEEING: dict[str, Pruner] = {
    "obs": ObsPruner(),
    "sparsegpt": SparseGptPruner(),
    "gptq": GptqPruner([4, 2], 16),
    "wanda": WandaPruner(),
    "2:4": WandaPruner("2:4"),
    "wanda_sp": WandaSpPruner(),
    "flap": FlapPruner(),
    "amp": AmpPruner(),
}


@pytest.mark.parametrize("name", SEEING)
def test_activations_that_are_not_finite_are_told_with_their_unit(
    model_of: ModelOf, tmp_path: Path, built: Built, name: str
) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\S*: activations are not finite; check") as told:
        built(model, tmp_path, SEEING[name], IDS, weights=dense)
    assert "\n" not in str(told.value)
    folder = next(tmp_path.iterdir())
    assert {re.sub(r"\.\w+_proj", "", file.stem) for file in (folder / "units").iterdir()} == {
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.self_attn",
    }


WEIGHING: dict[str, Pruner] = SEEING | {
    "magnitude": MagnitudePruner(),
    "rtn": RtnPruner([4, 2], 16),
    "apt": AptPruner(),
    "gblm": GblmPruner(),
    "magnitude_sp": MagnitudeMembersPruner(8),
    "taylor": TaylorPruner(8),
    "bonsai": BonsaiPruner(8, samples=4),
}


@pytest.mark.sampled
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", WEIGHING)
def test_weights_that_are_not_finite_are_told(
    model_of: ModelOf, tmp_path: Path, built: Built, name: str, value: float
) -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(InputError, match=r"not finite; check the model's weights, or use dtype=float32$") as told:
        built(model, tmp_path, WEIGHING[name], IDS, weights=dense)
    assert "\n" not in str(told.value)
