"""The stream of the calibration text, on whatever device and disk, and what the next sub-block sees of a unit's
levels.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import FITS, Pruner, Task
from local_prune.text.devices import moved
from local_prune.text.passes import TextWalk
from local_prune.text.streams import Streams
from local_prune.walk import mean_parameters
from supernet.candidates import Candidate, Members, member_columns
from supernet.errors import InputError
from supernet.models.architecture import ATTENTION, sub_blocks
from supernet.models.forward import entry
from supernet.models.placement import full_weight
from supernet.space import Unit
from supernet.store import Supernet

IDS = torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(3))
CPU, META = torch.device("cpu"), torch.device("meta")

Built = Callable[..., Supernet]
ModelOf = Callable[..., PreTrainedModel]


def second_level(unit: Unit, index: int) -> list[float]:
    """Exact error accumulation."""
    return [float(level == 1) for level in range(len(unit.levels))]


def dense(unit: Unit, index: int) -> list[float]:
    return [float(level == 0) for level in range(len(unit.levels))]


# What blocks are told


def test_what_blocks_share_is_moved_once_and_what_differs_stays_apart() -> None:
    shared, other, table = torch.zeros(3), torch.zeros(3), (torch.zeros(2), torch.ones(2))
    contexts = [
        {"mask": shared, "rotary": table, "flag": True},
        {"mask": other, "rotary": (table[0], table[1]), "flag": None},
    ]
    first, second, third = moved([*contexts, {"mask": shared}], META)
    assert first["mask"] is third["mask"] is not second["mask"]
    assert first["rotary"][0] is second["rotary"][0] is not first["rotary"][1] is second["rotary"][1]
    assert all(tensor.is_meta for tensor in (first["mask"], second["mask"], *first["rotary"]))
    assert (first["flag"], second["flag"]) == (True, None)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_windowed_blocks_keep_masks_and_tables_of_their_own(model_of: ModelOf, family: str) -> None:
    """Some blocks see all tokens and others a window; Gemma 3 has rotary tables of two kinds, too."""
    model = model_of(family)
    model.set_attn_implementation("eager")
    contexts = entry(model, IDS)[1]
    walk = TextWalk(model, META)
    hidden = walk.enter(IDS)
    there = [walk.context(part, hidden.shape[1]) for part in walk.parts if part.kind == ATTENTION]
    for key in ("attention_mask", "position_embeddings"):
        before = [context[key][0] if isinstance(context[key], tuple) else context[key] for context in contexts]
        after = [context[key][0] if isinstance(context[key], tuple) else context[key] for context in there]
        same = [[a is b for b in tensors] for tensors in (before, after) for a in tensors]
        assert same[: len(before)] == same[len(before) :]
        assert any(sum(row) > 1 for row in same)
    assert len({id(context["attention_mask"]) for context in there}) == 2


def test_masks_are_made_once_for_sequences_of_one_length(model_of: ModelOf) -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    walk = TextWalk(model, CPU)
    first, second, short = walk.enter(IDS), walk.enter(IDS[:2]), walk.enter(IDS[:, :7])
    part = walk.parts[0]
    assert walk.context(part, first.shape[1]) is walk.context(part, second.shape[1])
    assert walk.context(part, first.shape[1])["attention_mask"].shape == (1, 1, 16, 16)
    assert walk.context(part, short.shape[1])["attention_mask"].shape == (1, 1, 7, 7)


# What fits aim at


TARGETS = {"pruned": "own output", "dense": "dense output", "residual": "residual"}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("pruner", [ObsPruner(), SparseGptPruner()], ids=["members", "weights"])
def test_the_manifest_says_what_errors_are_relative_to(
    model_of: ModelOf, tmp_path: Path, built: Built, pruner: Pruner, fit: str
) -> None:
    model = model_of("llama")
    units = built(model, tmp_path, pruner, IDS, weights=second_level, fit=fit).manifest["units"]
    ends = {name for part in sub_blocks(model) for name in (part.name, f"{part.name}.{part.column}")}
    for name, record in units.items():
        assert record["target"] == (TARGETS[fit] if fit == "dense" or name in ends else "own output")
    alone = built(model, tmp_path / "without accumulation", pruner, IDS, weights=dense, fit=fit).manifest["units"]
    assert {record["target"] for record in alone.values()} == {"own output"}


def test_methods_that_fit_nothing_record_no_target(model_of: ModelOf, tmp_path: Path, built: Built) -> None:
    units = built(model_of("llama"), tmp_path, WandaPruner(), IDS).manifest["units"]
    assert not any({"target", "errors"} & record.keys() for record in units.values())


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_where_no_layer_reaches_the_residual_the_dense_stream_is_not_kept(
    model_of: ModelOf,
    tmp_path: Path,
    built: Built,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    made: list[Streams] = []
    make = Streams.__init__

    def noting(self: Streams, *arguments: Any) -> None:
        make(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Streams, "__init__", noting)
    with caplog.at_level(logging.INFO, "local_prune.walk"):
        built(model_of(family), tmp_path, ObsPruner(), IDS, fit="residual")
    told = "prune.fit=residual is fitted as pruned: a norm follows the sub-blocks"
    assert [record.message for record in caplog.records] == ([told] if family == "gemma2" else [])
    assert [one.dense is None for one in made] == [family == "gemma2"]


class SpoilingPruner(SparseGptPruner):
    """Leaves a number in one layer that is none."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        found = super().candidates(task, kept)
        if task.where.endswith("1.mlp.up_proj"):
            found[-1].weight[0, 0] = torch.inf  # type: ignore[union-attr, index]
        return found


def test_candidates_that_are_not_finite_are_never_stored(model_of: ModelOf, tmp_path: Path, built: Built) -> None:
    with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.up_proj: what is left is not finite; "):
        built(model_of("llama"), tmp_path, SpoilingPruner(), IDS)
    stored = {file.stem for file in tmp_path.rglob("*.safetensors")}
    assert "model.layers.1.mlp.gate_proj" in stored and "model.layers.1.mlp.up_proj" not in stored


# What the next sub-block sees


@pytest.mark.parametrize("compensated", [False, True])
@torch.no_grad()
def test_the_mean_parameters_give_the_mean_output(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, compensated: bool
) -> None:
    weights = [0.4, 0.3, 0.2, 0.1]  # the last level drops the sub-block, and its bias with it
    hidden, contexts = entry(family_model, ids)
    for index, part in enumerate(sub_blocks(family_model)):
        X, column = part.inputs(part.column, hidden, contexts[part.block]), part.column
        candidates = {level: family_supernet.candidate(index, level) for level in (1, 2, 3)}
        if compensated:
            bias = torch.randn(len(part.weight(column)), generator=torch.Generator().manual_seed(index))
            candidates[2] = Members(candidates[2].kept, candidates[2].weight, bias)
        found, share = mean_parameters(part, column, candidates, weights)
        expected = weights[0] * linear(X, part.weight(column), part.bias(column))
        for level in (1, 2):
            one = candidates[level]
            own = part.bias(column) if one.bias is None else one.bias
            expected += weights[level] * linear(X[:, member_columns(one.kept, part.groups.width)], one.weight, own)
        weight = found[f"{column}.weight"]
        weight = weight.T if isinstance(part.module.get_submodule(column), Conv1D) else weight
        assert share == pytest.approx(0.9)
        assert set(found) <= {f"{column}.weight", f"{column}.bias"}
        output = share * linear(X, weight, found.get(f"{column}.bias"))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_over_one_level_is_that_level(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    for index, part in enumerate(sub_blocks(family_model)):
        one = {level: family_supernet.candidate(index, level) for level in (1, 3)}
        assert mean_parameters(part, part.column, {}, [1.0, 0.0, 0.0, 0.0]) == ({}, 1.0)
        assert mean_parameters(part, part.column, {3: one[3]}, [0.0, 0.0, 0.0, 1.0]) == ({}, 0.0)
        assert mean_parameters(part, part.column, {3: one[3]}, [0.25, 0.0, 0.0, 0.75]) == ({}, 0.25)
        found, share = mean_parameters(part, part.column, {1: one[1]}, [0.0, 1.0, 0.0, 0.0])
        expected = part.replaced(part.column, full_weight(part, part.column, one[1]))
        assert share == 1.0 and torch.equal(found[f"{part.column}.weight"], expected[f"{part.column}.weight"])
