"""The dense model's targets are the same wherever they lie, and main memory holds no more of them than it may."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluate.held_out import HeldOut
from search.evaluation.fitness import KlDivergence, Targets
from search.evaluation.generation import GenerationEvaluator
from search.evaluation.resources import Resources
from search.evaluation.teacher import TeacherTargets
from supernet.errors import InputError
from supernet.store import Supernet


def made(seed: int, dtype: torch.dtype = torch.bfloat16) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 6, generator=generator).to(dtype)
    return Targets(hidden, torch.randn(7, 6, generator=generator), torch.randn(7, generator=generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_exceeds_the_limit_lies_in_files_and_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    size = 7 * 6 * (dtype.itemsize + 4) + 7 * 4
    kept = TeacherTargets(2 * size, tmp_path)
    for sequence in (5, 3, 8, 1):
        kept.add(sequence, made(sequence, dtype))
    assert (kept.in_memory, kept.in_files) == (2 * size, 2 * size)
    assert 8 in kept and 2 not in kept
    for sequence in (5, 3, 8, 1):
        for name in ("hidden", "expected", "normaliser"):
            found, expected = (getattr(one, name) for one in (kept[sequence], made(sequence, dtype)))
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert list(tmp_path.iterdir()) == []  # no name is left behind, however the process ends


@pytest.mark.sampled(0)
def test_no_result_depends_on_where_they_lie(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, tmp_path: Path
) -> None:
    allocations = [(1,) * len(family_supernet.space.units), (2,) * len(family_supernet.space.units)]
    in_memory = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence())
    in_files = GenerationEvaluator(family_model, family_supernet, ids, KlDivergence(), Resources(scratch=tmp_path))
    in_files.comparison.targets.limit = 0
    every = np.arange(5)
    np.testing.assert_array_equal(in_files(allocations, every), in_memory(allocations, every))
    for a, b in zip(in_files.effects(allocations[0], every), in_memory.effects(allocations[0], every), strict=True):
        np.testing.assert_array_equal(a, b)
    assert in_files.comparison.targets.in_memory == 0 < in_files.comparison.targets.in_files


@pytest.mark.sampled(0)
def test_held_out_text_is_no_exception(family_model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    def batches(items: object, title: str) -> object:
        return items

    plain, filed = (HeldOut(family_model, ids, 2, batches, 0, TeacherTargets(n, tmp_path)) for n in (1 << 30, 0))  # type: ignore[arg-type]
    assert filed.targets.in_memory == 0 < filed.targets.in_files
    np.testing.assert_array_equal(plain.dense.divergences, filed.dense.divergences)


def test_the_limit_is_part_of_the_plan() -> None:
    assert Resources(memory=1000).teacher_targets().limit == 1000
    assert 0 < Resources().teacher_targets().limit < 64 << 30


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        TeacherTargets(0, tmp_path / "file").add(0, made(0))


def test_of_main_memory_no_more_is_taken_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is free; of little, a share; and of a GPU's memory, which nobody else uses, always a share."""
    monkeypatch.setattr("search.evaluation.resources.available", lambda device=None: 1 << 40)
    plain = Resources()
    limits = [plain.state_bytes(), plain.candidate_bytes(), plain.target_bytes()]
    assert limits == [1 << 30, 1 << 29, 1 << 29] and plain.total_bytes() == sum(limits)
    assert Resources(memory=5 << 30, cache=3 << 30).total_bytes() == 13 << 30
    assert Resources(resident="blocks").candidate_bytes() == 0
    assert Resources(torch.device("cuda")).state_bytes() == int(0.4 * (1 << 40))
    monkeypatch.setattr("search.evaluation.resources.available", lambda device=None: 1 << 30)
    assert Resources().state_bytes() == int(0.4 * (1 << 30))
