"""Every pruner's candidates of a tiny model are those on record, so that no formula changes without a raised version.

`golden.json` has a few numbers of each case: the length of what candidates hold and its projections on random
directions, with a tolerance that last bits stay far below, and one changed mask bit or code far above. Where a change
is meant: raise `version` of the pruner's class (or `VERSION` in local_prune/walk.py if the walk has changed), and then
renew the record:

    RENEW_GOLDEN=1 python -m pytest tests/local_prune/methods/test_golden.py

That refuses to record other numbers under the same version.
"""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from local_prune.methods.amp import AmpPruner
from local_prune.methods.apt import AptPruner
from local_prune.methods.bonsai import BonsaiPruner
from local_prune.methods.depth import DepthPruner
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
from local_prune.pruner import Pruner
from local_prune.walk import VERSION
from search.paths import conf_dir
from supernet.store import Supernet

FILE = Path(__file__).with_name("golden.json")
IDS = torch.from_numpy(np.random.RandomState(0).randint(97, size=(6, 24)))
TOLERANCE = 3e-4  # of the length
Numbers = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    pruner: Pruner
    family: str = "llama_with_biases"
    sparse: bool = False  # half of the model's weights are 0 already
    seed: int = 1  # such that no two weights are so close to a tie that last bits, which differ between CPUs, decide
    how: dict[str, Any] = field(default_factory=dict)  # options of `built`
    changes: dict[str, Any] = field(default_factory=dict)  # of the model's configuration


RESIDUAL = {"fit": "residual"}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4}
LEVELS = {"kept": (0.9, 0.75, 0.6, 0.45, 0.3, 0.15)}  # a ranking shows in the levels alone
RANKING = {"how": LEVELS, "changes": HEADS}
LLAMA = {"hidden_size": 32, "intermediate_size": 48}
SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_hidden_layers": 2},
    "llama_with_biases": LLAMA | {"num_hidden_layers": 2},
    "gemma2": LLAMA,
    "gpt2": {"hidden_size": 32, "n_inner": 48, "num_hidden_layers": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}
CASES = {
    "obs": Case(ObsPruner(multiple=8), how=RESIDUAL),
    "obs, first order": Case(ObsPruner(first_order=1.0, multiple=8), **RANKING),
    "obs, query heads": Case(ObsPruner(multiple=8, query_heads=True), how={"fit": "dense"}),
    "obs, gemma2": Case(ObsPruner(multiple=8), "gemma2", how=RESIDUAL),
    "obs, gpt2": Case(ObsPruner(multiple=8), "gpt2", how=RESIDUAL),
    "magnitude_sp": Case(MagnitudeMembersPruner(8), **RANKING),
    "wanda_sp": Case(WandaSpPruner(8), **RANKING),
    "flap": Case(FlapPruner(8), **RANKING),
    "flap, no biases before": Case(FlapPruner(8), "llama"),
    "taylor": Case(TaylorPruner(8), **RANKING),
    "taylor, query heads": Case(TaylorPruner(8, query_heads=True)),
    "amp": Case(AmpPruner(8), **RANKING),
    "bonsai": Case(BonsaiPruner(8, samples=16, drop=0.2), **RANKING),
    "magnitude": Case(MagnitudePruner()),
    "magnitude, 2:4": Case(MagnitudePruner("2:4")),
    "wanda": Case(WandaPruner()),
    "wanda, patterns": Case(WandaPruner(("3:4", "2:4"))),
    "gblm": Case(GblmPruner(gradient_weight=10.0)),
    "gblm, l1, 2:4": Case(GblmPruner("2:4", gradient_weight=10.0, norm=1)),
    "sparsegpt": Case(SparseGptPruner(block=16), how=RESIDUAL),
    "sparsegpt, no refit": Case(SparseGptPruner(block=16, refit=0)),
    "sparsegpt, 2:4": Case(SparseGptPruner("2:4"), seed=2, how=RESIDUAL),
    "sparsegpt, sparse": Case(SparseGptPruner(block=16), sparse=True),
    "sparsegpt, mamba": Case(SparseGptPruner(block=16), "mamba"),
    "apt": Case(AptPruner(block=16), how=RESIDUAL),
    "apt, patterns": Case(AptPruner(("4:8", "2:8")), how=RESIDUAL),
    "apt, 2:4, sparse": Case(AptPruner("2:4"), sparse=True),
    "rtn": Case(RtnPruner([8, 4, 2], 16)),
    "rtn, symmetric": Case(RtnPruner([4, 3], 16, symmetric=True)),
    "gptq": Case(GptqPruner([4, 2], 16), seed=2, how=RESIDUAL),
    "gptq, symmetric": Case(GptqPruner([4, 3], 16, symmetric=True), seed=16),
    "gptq, as they come": Case(GptqPruner([4, 2], 16, activation_order=False, block=32), seed=10),
    "gptq, sparse": Case(GptqPruner([4, 2], 16), sparse=True, seed=2),
    "depth": Case(DepthPruner()),
    "depth, blocks": Case(DepthPruner(whole_blocks=True)),
}


def tiny_model(model_of: Callable[..., PreTrainedModel], case: Case, disturbed: float = 0.0) -> PreTrainedModel:
    """Two blocks or three; the weights are numpy's, whose old generator gives the same numbers for ever.

    Args:
        model_of: The fixture.
        case: What it is for.
        disturbed: Relative change of each weight, for finding seeds that are far from ties.
    """
    model, random = model_of(case.family, **SMALL[case.family], **case.changes), np.random.RandomState(case.seed)
    for name, parameter in model.named_parameters():
        value = random.standard_normal(parameter.shape) * 0.2 + float("norm" in name or ".ln_" in name)
        if case.sparse and "proj" in name:
            value *= random.random_sample(parameter.shape) < 0.5
        parameter.copy_(torch.from_numpy(value * (1.0 + disturbed * np.random.standard_normal(value.shape))))
    return model


def numbers_of(supernet: Supernet) -> Numbers:
    """By block and kind of tensor: the length of all that the candidates hold, and its projections on two
    directions.
    """
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for index, unit in enumerate(supernet.space.units):
        block = next(part for part in unit.name.split(".") if part.isdigit())
        for level in range(1, len(unit.levels)):
            candidate = supernet.candidate(index, level)
            found[f"{block} {type(candidate).__name__}"].append(np.ones(1))
            for one in fields(candidate):
                if isinstance(value := getattr(candidate, one.name), torch.Tensor):
                    found[f"{block} {one.name}"].append(value.double().flatten().numpy())
    return {name: _summary(name, np.concatenate(values)) for name, values in found.items()}


def _summary(name: str, values: np.ndarray) -> list[float]:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    directions = random.standard_normal((2, len(values)))
    return [float(f"{number:.7g}") for number in (np.linalg.norm(values), *directions @ values)]


def differences(before: Numbers, now: Numbers) -> list[str]:
    """What is not as it was."""
    found = [name for name in before.keys() | now.keys() if (name in before) != (name in now)]
    for name in before.keys() & now.keys():
        if not np.allclose(before[name], now[name], rtol=0, atol=TOLERANCE * max(1e-9, before[name][0])):
            found.append(f"{name}: {before[name]} on record, {now[name]} now")
    return sorted(found)


@pytest.mark.parametrize("name", CASES)
def test_candidates_are_those_on_record(
    name: str, model_of: Callable[..., PreTrainedModel], built: Callable[..., Supernet], tmp_path: Path
) -> None:
    case, record = CASES[name], json.loads(FILE.read_text())
    versions = {"walk": VERSION, case.pruner.name: case.pruner.version}
    numbers = numbers_of(built(tiny_model(model_of, case), tmp_path, case.pruner, IDS, **case.how))
    before = record.get(name, {"versions": None, "numbers": {}})
    changed = differences(before["numbers"], numbers)
    if before["versions"] == versions and changed:
        where = f"{type(case.pruner).__name__}.version (or VERSION of local_prune/walk.py)"
        pytest.fail(
            f"the same settings give other candidates than before: raise {where}, see this file's docstring\n{changed}"
        )
    if "RENEW_GOLDEN" in os.environ:
        if changed or before["versions"] != versions:
            record[name] = {"versions": versions, "numbers": numbers}
            text = ",\n".join(f"{json.dumps(key)}: {json.dumps(record[key])}" for key in CASES if key in record)
            FILE.write_text(f"{{\n{text}\n}}\n")
        return
    assert before["versions"] == versions, f"renew the record: RENEW_GOLDEN=1 python -m pytest {Path(__file__).name}"


def test_every_method_is_on_record() -> None:
    methods = {file.stem for file in (conf_dir() / "prune").glob("*.yaml")}
    assert methods == {case.pruner.name for case in CASES.values()}
    assert set(json.loads(FILE.read_text())) == set(CASES)


def test_one_changed_bit_or_code_is_seen_and_last_bits_are_not() -> None:
    values = np.random.RandomState(3).standard_normal(4000)
    for array, change in ((values > 0, 1.0), (np.round(values * 4) + 8, 1.0)):
        before = {"mask": _summary("mask", array.astype(float))}
        changed = array.astype(float)
        changed[1234] = changed[1234] + change if not changed[1234] else changed[1234] - change
        assert differences(before, {"mask": _summary("mask", changed)})
    before = {"weight": _summary("weight", values)}
    assert not differences(before, {"weight": _summary("weight", values * (1 + 1e-5 * np.sin(np.arange(4000))))})
    assert differences(before, {"weight": _summary("weight", values * 1.001)})
    assert differences(before, {}) == differences({}, before) == ["weight"]
