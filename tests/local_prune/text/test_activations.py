"""A list of tensors in memory or in a file without a name."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from local_prune.text.activations import Activations
from supernet.errors import InputError


@pytest.mark.parametrize("in_memory", [True, False])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_set_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, in_memory: bool, lengths: list[int], dtype: torch.dtype
) -> None:
    shapes = [(length, 3, 2) for length in lengths]
    held = Activations(shapes, dtype, in_memory, tmp_path_factory.mktemp("activations"))
    generator = torch.Generator().manual_seed(sum(lengths))
    for _ in range(2):  # replaced by others
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        for index in reversed(range(len(shapes))):
            held[index] = values[index]
        assert len(held) == len(shapes)
        for index, value in enumerate(values):
            assert held[index].dtype == dtype
            assert torch.equal(held[index], value.to(dtype))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    held = Activations([(2, 3, 4)], torch.float32, True, tmp_path)
    with pytest.raises(RuntimeError):
        held[0] = torch.zeros(2, 3, 5)


def mapped() -> bool:
    return "/activations-" in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says which files are mapped")
def test_the_file_has_no_name_and_goes_with_its_list(tmp_path: Path) -> None:
    held = Activations([(2, 3, 4)], torch.float32, False, tmp_path / "not" / "yet")
    assert mapped()
    assert not list((tmp_path / "not" / "yet").iterdir())
    del held
    gc.collect()
    assert not mapped()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(descriptor: int, offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError) as told:
        Activations([(1000, 1000, 100)], torch.bfloat16, False, tmp_path)
    expected = f"cannot write 0.2 GB of activations to {tmp_path}: No space left on device; use fewer sequences"
    assert str(told.value) == expected
    assert asked == [200_000_000]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .* of activations to .*/file/folder: Not a directory"):
        Activations([(1, 1, 1)], torch.float32, False, tmp_path / "file" / "folder")
