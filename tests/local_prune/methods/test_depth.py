"""Depth computes nothing: units are present or dropped."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from local_prune.methods.depth import DepthPruner
from local_prune.pruner import Calibration, Task
from supernet.candidates import Dropped
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import assemble
from supernet.space import Level
from supernet.store import Supernet


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_units_are_all_that_is_residual(any_model: PreTrainedModel, whole_blocks: bool) -> None:
    parts = sub_blocks(any_model)
    found = DepthPruner(whole_blocks).prunables(parts)
    assert [one.name for one in found] == list(
        dict.fromkeys(part.block_name if whole_blocks else part.name for part in parts)
    )
    for one in found:
        cost = sum(part.parameters for part in parts if one.name in (part.name, part.block_name))
        assert one.choices == (Level(1, cost), Level(0, 0))
        assert one.total == 1


def test_candidates_are_nothing() -> None:
    pruner = DepthPruner()
    assert pruner.candidates(Task("unit", torch.zeros(2, 3)), [0]) == [Dropped()]
    assert pruner.candidates(Task("unit", torch.zeros(2, 3)), []) == []
    assert pruner.statistics(torch.zeros(2, 3), 1) is None
    assert pruner.survey_tokens(Calibration(torch.zeros(1, 1, dtype=torch.int64))) == 0


@pytest.mark.sampled
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_a_build_reads_no_text(
    any_model: PreTrainedModel, tmp_path: Path, built: Callable[..., Supernet], ids: torch.Tensor, whole_blocks: bool
) -> None:
    model = copy.deepcopy(any_model)
    model.get_input_embeddings().forward = None  # any pass would fail
    supernet = built(model, tmp_path, DepthPruner(whole_blocks), ids)
    assert supernet.complete
    assert sum(entry["bytes"] for entry in supernet.manifest["units"].values()) < 200 * len(supernet.space.units)
    without_last = [0] * (len(supernet.space.units) - 1) + [1]
    hidden = []
    with torch.no_grad():
        for one in (any_model, assemble(any_model, supernet, without_last)):
            hidden.append(one(ids).logits)
    assert not torch.equal(*hidden)
