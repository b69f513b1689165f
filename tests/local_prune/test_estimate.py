"""What a build takes is known before it starts."""

import copy
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from local_prune.estimate import Estimate, estimate, working_bytes
from local_prune.methods.amp import AmpPruner
from local_prune.methods.apt import AptPruner
from local_prune.methods.bonsai import BonsaiPruner
from local_prune.methods.depth import DepthPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.magnitude import MagnitudePruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.rtn import RtnPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.taylor import TaylorPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import FITS, Calibration, Pruner
from local_prune.walk import build
from search.inputs.models import random_llama
from supernet.errors import InputError
from supernet.models.placement import places
from supernet.space import Space, Unit
from supernet.store import Supernet

IDS = torch.randint(97, (7, 16), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")
KEPT = (0.75, 0.5, 0.25)
PRUNERS: dict[str, Pruner] = {
    "obs": ObsPruner(),
    "obs by query heads": ObsPruner(query_heads=True),
    "flap": FlapPruner(),
    "amp": AmpPruner(),
    "taylor": TaylorPruner(),
    "bonsai": BonsaiPruner(samples=8),
    "magnitude": MagnitudePruner(),
    "wanda": WandaPruner(),
    "wanda 2:4": WandaPruner("2:4"),
    "gblm": GblmPruner(),
    "sparsegpt": SparseGptPruner(),
    "apt 2:4": AptPruner("2:4"),
    "rtn": RtnPruner([4, 2], 16),
    "gptq": GptqPruner([4, 2], 16),
    "depth": DepthPruner(),
    "depth of whole blocks": DepthPruner(whole_blocks=True),
}
UNSEEING = {
    "taylor",
    "bonsai",
    "magnitude",
    "rtn",
    "depth",
    "depth of whole blocks",
}  # of the inputs of the pruned model

SpaceOf = Callable[..., Space]
ModelOf = Callable[..., PreTrainedModel]


def even(unit: Unit, index: int = 0) -> Sequence[float]:
    return [1 / len(unit.levels)] * len(unit.levels)


def mixture(space: Space) -> Mapping[str, Sequence[float]]:
    return {unit.name: even(unit) for unit in space.units}


def estimated(
    model: PreTrainedModel, space_of: SpaceOf, pruner: Pruner, ids: torch.Tensor = IDS, **settings: Any
) -> Estimate:
    space = space_of(model, pruner, KEPT)
    return estimate(model, Calibration(ids, 2, **settings), pruner, space, mixture(space), CPU)


@pytest.mark.parametrize("name", PRUNERS)
def test_it_is_what_a_build_takes(
    model_of: ModelOf, space_of: SpaceOf, built: Callable[..., Supernet], tmp_path: Path, name: str
) -> None:
    model, pruner = model_of("llama"), PRUNERS[name]
    found = estimated(model, space_of, pruner)
    supernet = built(model, tmp_path, pruner, IDS, kept=KEPT, weights=even)
    assert found.stored == pytest.approx(
        sum(file.stat().st_size for file in (supernet.path / "units").iterdir()), rel=0.01
    )
    assert found.seconds > 0.0
    assert found.model == sum(parameter.nbytes for parameter in model.parameters())
    # The stream is 64 wide; kept are the inputs of down_proj, the widest of the layers that end a sub-block.
    assert found.streams == (0 if name in UNSEEING else IDS.numel() * (64 + 96) * 4)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert block <= found.device < 100 * block


@pytest.mark.sampled
@pytest.mark.parametrize("family", ["mamba", "mamba2", "gemma3", "gpt2"])
@pytest.mark.parametrize("pruner", [SparseGptPruner(), DepthPruner(True)], ids=["weights", "blocks"])
def test_of_other_families(
    model_of: ModelOf, space_of: SpaceOf, built: Callable[..., Supernet], tmp_path: Path, family: str, pruner: Pruner
) -> None:
    model = model_of(family)
    supernet = built(model, tmp_path, pruner, IDS, kept=KEPT, weights=even)
    written = sum(file.stat().st_size for file in (supernet.path / "units").iterdir())
    assert estimated(model, space_of, pruner).stored == pytest.approx(written, rel=0.01)


def test_fits_to_the_dense_model_take_its_stream_too(model_of: ModelOf, space_of: SpaceOf) -> None:
    streams = {fit: estimated(model_of("llama"), space_of, ObsPruner(), fit=fit).streams for fit in FITS}
    assert streams["dense"] == streams["residual"] == streams["pruned"] + IDS.numel() * 64 * 4


@pytest.mark.parametrize("name", PRUNERS)
def test_the_survey_takes_its_time(
    model_of: ModelOf, space_of: SpaceOf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("local_prune.estimate._seconds_per_token", lambda *_: 1.0)  # of each of three blocks
    survey = 3 * PRUNERS[name].survey_tokens(Calibration(IDS, 2))
    assert (survey > 0) == (name in ("taylor", "gblm", "bonsai"))
    assert survey <= estimated(model_of("llama"), space_of, PRUNERS[name]).seconds < survey + 100


@pytest.mark.slow
def test_the_time_is_about_right(space_of: SpaceOf, built: Callable[..., Supernet], tmp_path: Path) -> None:
    """Only of the right order: the machine may have other things to do."""
    model = random_llama(
        seed=0, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, dtype=torch.float32,
    ).model  # fmt: skip
    ids = torch.randint(97, (32, 64), generator=torch.Generator().manual_seed(3))
    found = estimated(model, space_of, ObsPruner(), ids)
    begun = time.perf_counter()
    built(model, tmp_path, ObsPruner(), ids, kept=KEPT)
    taken = time.perf_counter() - begun
    assert taken / 5 < found.seconds < taken * 5


def test_it_leaves_nothing_behind(
    model_of: ModelOf, space_of: SpaceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = model_of("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for pruner in (ObsPruner(), SparseGptPruner(), DepthPruner()):
        estimated(model, space_of, pruner)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_build_could_not_do_is_told_at_once(model_of: ModelOf, space_of: SpaceOf) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.model.layers[0].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp: activations are not finite"):
        estimated(model, space_of, ObsPruner())


class Meter(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on, now and at the peak."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in model.state_dict().values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return output

    def note(self, storage: Any) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self.known:
            self.known[name] = weakref.ref(storage, lambda _: self.forget(name, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def forget(self, name: int, size: int) -> None:
        del self.known[name]
        self.live -= size


EIGHT = [1 - level / 9 for level in range(1, 9)]
DOWN, UP = ("mlp.down_proj",), ("mlp.gate_proj", "mlp.up_proj")
WORKING = [
    ("obs", ("mlp",)),
    ("flap", ("mlp",)),
    *((name, units) for name in ("sparsegpt", "apt", "gptq", "wanda") for units in (DOWN, UP)),
]


@pytest.mark.sampled(0)
@pytest.mark.parametrize(("name", "units"), WORKING, ids=[f"{name}, {units[0]}" for name, units in WORKING])
def test_the_working_memory_is_about_right(
    space_of: SpaceOf, tmp_path: Path, name: str, units: tuple[str, ...]
) -> None:
    """Of a layer 1536 -> 512, and of two side by side of 512 -> 1536, at eight levels."""
    pruners: dict[str, Pruner] = PRUNERS | {"apt": AptPruner(), "gptq": GptqPruner([8, 7, 6, 5, 4, 3, 2])}
    pruner, sizes = pruners[name], {"num_attention_heads": 16, "num_key_value_heads": 16, "dtype": torch.float32}
    model = random_llama(seed=0, hidden_size=512, intermediate_size=1536, num_hidden_layers=1, **sizes).model
    ids = torch.randint(97, (2, 128), generator=torch.Generator().manual_seed(3))
    space = space_of(model, pruner, EIGHT)
    space = Space(tuple(unit for unit in space.units if unit.name.endswith(units)))
    place = next(place for place in places(model, space) if place.units)
    supernet = Supernet.open_or_create(tmp_path, space, {})
    with Meter(model) as meter:
        build(model, Calibration(ids, 2), pruner, supernet, mixture(space), CPU, lambda items, _: items, "build")
    streams = ids.numel() * (512 + (0 if units == UP else 1536)) * 4
    found = working_bytes(place, pruner, space, Calibration(ids, 2))
    assert (meter.peak - streams) / 1.5 < found < (meter.peak - streams) * 1.5


@pytest.mark.parametrize("name", PRUNERS)
def test_what_a_survey_keeps_is_told(model_of: ModelOf, space_of: SpaceOf, name: str) -> None:
    model = model_of("llama")
    linear = sum(parameter.numel() for key, parameter in model.named_parameters() if "_proj" in key)
    found = estimated(model, space_of, PRUNERS[name])
    assert found.survey == (4 * linear if name in ("taylor", "gblm") else 0)
    assert ("for the survey" in str(found)) == (name in ("taylor", "gblm"))


def test_it_is_one_line_to_read() -> None:
    found = Estimate(1234.5, 12_345_678, 3_210_000_000, 900, 538_000_000)
    assert str(found) == (
        "about 1,234 s, 12 MB on disk; in memory 538 MB for the model, 1 kB for activations, 3.2 GB for a block at work"
    )
    surveyed = Estimate(1234.5, 12_345_678, 3_210_000_000, 900, 538_000_000, 425_000_000)
    assert "1 kB for activations, 425 MB for the survey, 3.2 GB for a block at work" in str(surveyed)
    shared = Estimate(1234.5, 12_345_678, 3_210_000_000, 900, 538_000_000, states=864_000_000)
    assert "12 MB on disk and 864 MB more until the run ends; in memory 538 MB" in str(shared)
