"""Free memory is what the machine, the container and the process leave, and errors for want of it are told from
others.
"""

import errno
import resource
from pathlib import Path

import psutil
import pytest
import torch

from supernet.system import memory
from supernet.system.memory import available, give_back_freed_memory, is_out_of_memory, keep_freed_memory, peak

VERSION_1, VERSION_2 = reversed(memory.CGROUPS)


def test_no_more_is_free_than_the_machine_has() -> None:
    assert 0 < available() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_where_there_is_no_high_water_mark_the_peak_is_the_one_of_getrusage(
    system: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which counts kilobytes everywhere but on macOS."""
    monkeypatch.setattr(memory, "Path", lambda _: Path("/does/not/exist"))
    monkeypatch.setattr(memory.sys, "platform", system)
    least = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert least * unit <= peak() <= 2 * least * unit


def test_a_limit_on_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 10_000_000, resource.RLIM_INFINITY))
    assert available() <= 10_000_000 + 1_000_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used // 2, resource.RLIM_INFINITY))
    assert available() == 0


def write_group(
    root: Path, names: tuple[str, str, str, str], limit: str, usage: int, cache: int, shared: int = 0
) -> None:
    folder = (root / names[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    (root / names[0]).write_text(f"{limit}\n")
    (root / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n{names[3]} {shared}\n")


@pytest.mark.parametrize("names", [VERSION_1, VERSION_2])
def test_a_containers_limit_counts_without_what_the_kernel_takes_back(
    tmp_path: Path, names: tuple[str, str, str, str]
) -> None:
    write_group(tmp_path, names, "1000000", 700_000, 250_000, shared=50_000)
    assert memory._left_in_group(*names, root=tmp_path) == 500_000


@pytest.mark.parametrize("names", [VERSION_1, VERSION_2])
@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_is_none(tmp_path: Path, names: tuple[str, str, str, str], limit: str) -> None:
    write_group(tmp_path, names, limit, 700_000, 200_000)
    assert memory._left_in_group(*names, root=tmp_path) is None


def test_limits_of_groups_around_this_one_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "slurm/job_7"
    for folder, limit in ((job / "task_0", "max"), (job, "1000000"), (tmp_path / "slurm", "5000000")):
        write_group(folder, VERSION_2, limit, 700_000, 200_000)
    monkeypatch.setattr(memory, "_group_folders", lambda root: [job / "task_0", job, tmp_path / "slurm", root])
    assert memory._left_in_group(*VERSION_2, root=tmp_path) == 500_000


@pytest.mark.parametrize(
    ("root", "groups", "expected"),
    [
        ("", "0::/slurm/job_7\n", ["slurm/job_7", "slurm", ""]),
        ("memory", "5:cpu:/other\n4:memory,hugetlb:/job_7\n0::/else\n", ["memory/job_7", "memory"]),
        ("memory", "0::/slurm/job_7\n", ["memory"]),
        ("", "", [""]),
    ],
    ids=["version 2", "version 1", "version 1 without memory", "no groups"],
)
def test_the_group_of_this_process_and_those_around_it_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, groups: str, expected: list[str]
) -> None:
    own = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: groups if path == Path("/proc/self/cgroup") else own(path))
    assert memory._group_folders(tmp_path / root) == [tmp_path / name for name in expected]


def test_a_machine_without_control_groups_has_none(tmp_path: Path) -> None:
    assert memory._left_in_group(*VERSION_2, root=tmp_path) is None


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_for_want_of_memory_are_told_from_others(error: Exception, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_what_torch_says_on_this_machine_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_keeping_freed_memory_can_be_asked_for_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back_freed_memory()
    monkeypatch.setattr("sys.platform", "darwin")
    keep_freed_memory()
    give_back_freed_memory()
