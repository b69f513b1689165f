"""The fingerprint of a build has all that changes candidates, and nothing that does not."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.identity import build_record, identity_of, reads_text
from local_prune.methods.depth import DepthPruner
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
from local_prune.pruner import Calibration, Pruner
from supernet.space import Space

SpaceOf = Callable[..., Space]
CPU = torch.device("cpu")


@pytest.fixture
def record(model_of: Callable[..., PreTrainedModel], space_of: SpaceOf, ids: Tensor) -> Callable[..., dict[str, Any]]:
    """`build_record` of a tiny model: (pruner, weights of the two levels, device, fit and batch) -> record."""

    def make(
        pruner: Pruner, weights: tuple[float, float] = (0.5, 0.5), device: str = "cpu", name: str = "llama", **how: Any
    ) -> Any:
        model = model_of(name)
        space = space_of(model, pruner, (0.5,))
        return build_record(
            model,
            Calibration(ids, **how),
            pruner,
            space,
            {unit.name: weights for unit in space.units},
            torch.device(device),
        )

    return make


def test_settings_are_the_real_ones_with_defaults_and_whatever_they_are_written_as() -> None:
    assert identity_of(ObsPruner()) == {
        "name": "obs",
        "version": ObsPruner.version,
        "settings": {"damping": 0.01, "first_order": 0.0},
    }
    assert repr(identity_of(ObsPruner(damping=1))) == repr(identity_of(ObsPruner(damping=1.0)))
    listed = OmegaConf.create({"bits": [4, 2], "pattern": ["2:4", "1:4"]})
    assert identity_of(GptqPruner(listed.bits)) == identity_of(GptqPruner((4, 2)))
    assert identity_of(WandaPruner(listed.pattern))["settings"] == {"pattern": ["2:4", "1:4"]}
    assert identity_of(ObsPruner(multiple=8, query_heads=True)) == identity_of(ObsPruner())  # the space has them


@pytest.mark.parametrize(
    ("pruner", "changes"),
    [
        (ObsPruner(), {"damping": 0.02, "first_order": 1.0}),
        (SparseGptPruner(), {"pattern": "2:4", "damping": 0.1, "block": 32, "refit": 0}),
        (
            GptqPruner(),
            {"bits": (4, 2), "group": 32, "symmetric": True, "activation_order": False, "damping": 0.1, "block": 32},
        ),
        (GblmPruner(), {"pattern": "2:4", "gradient_weight": 1.0, "norm": 1}),
        (DepthPruner(), {"whole_blocks": True}),
    ],
)
def test_each_setting_counts(pruner: Any, changes: dict[str, Any]) -> None:
    assert set(changes) == {one.name for one in fields(pruner)} - {"multiple", "query_heads"}
    for name, value in changes.items():
        assert identity_of(replace(pruner, **{name: value})) != identity_of(pruner)


def test_the_method_its_version_and_the_walks_count(
    record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(WandaPruner())
    assert record(MagnitudePruner()) != before
    with monkeypatch.context() as patch:
        patch.setattr(WandaPruner, "version", WandaPruner.version + 1)
        assert record(WandaPruner()) != before
    monkeypatch.setattr("local_prune.identity.VERSION", 99)
    assert record(WandaPruner()) != before


def test_the_kind_of_device_counts_and_not_which_of_them(record: Callable[..., Any]) -> None:
    assert record(ObsPruner(), device="cuda") != record(ObsPruner())
    assert record(ObsPruner(), device="cuda:1") == record(ObsPruner(), device="cuda:0")


@pytest.mark.parametrize(("library", "reading"), [(torch, (True, True)), (transformers, (True, False))])
def test_releases_of_libraries_count_and_their_patches_do_not(
    record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, library: Any, reading: tuple[bool, bool]
) -> None:
    for pruner, counts in zip((WandaPruner(), MagnitudePruner()), reading, strict=True):
        records = []
        for version in ("7.1.0", "7.1.2+cu130", "7.2.0"):
            with monkeypatch.context() as patch:
                patch.setattr(library, "__version__", version)
                records.append(record(pruner))
        assert records[0] == records[1]
        assert (records[0] != records[2]) == counts


def test_what_makes_no_difference_does_not_count(record: Callable[..., Any]) -> None:
    assert record(ObsPruner(), batch=1) == record(ObsPruner(), batch=4)
    assert record(ObsPruner(), fit="dense") != record(ObsPruner(), fit="residual") != record(ObsPruner())
    dense = (1.0, 0.0)
    # no errors, one target
    assert record(ObsPruner(), dense, fit="dense") == record(ObsPruner(), dense) != record(ObsPruner())
    assert record(WandaPruner(), fit="dense") == record(WandaPruner())  # fits nothing
    assert record(ObsPruner(), name="gemma2", fit="residual") == record(ObsPruner(), name="gemma2")  # norms in the way
    assert record(MagnitudePruner(), dense, fit="dense") == record(MagnitudePruner())  # sees no inputs


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        (DepthPruner(), False),
        (MagnitudePruner(), False),
        (RtnPruner(), False),
        (MagnitudeMembersPruner(), False),
        (TaylorPruner(), True),
        (WandaSpPruner(), True),
        (GblmPruner(), True),
        (ObsPruner(), True),
    ],
)
def test_text_counts_where_it_is_read(
    model_of: Callable[..., PreTrainedModel], ids: Tensor, pruner: Pruner, expected: bool
) -> None:
    assert reads_text(model_of("llama"), Calibration(ids), pruner) is expected
