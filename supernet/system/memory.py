"""Tells how much memory is free, on the device and on this machine, and how much was taken; gives freed memory back."""

from __future__ import annotations

import ctypes
import errno
import resource
import sys
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 32 << 20  # glibc takes no higher threshold
CPU = torch.device("cpu")
# For each version of control groups the files with the limit and the usage, then two names in `memory.stat`: the page
# cache in that usage, which the kernel takes back when memory is short, and the shared memory in that cache, which it
# does not take back.
CGROUPS = (
    ("memory.max", "memory.current", "file", "shmem"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_cache", "total_shmem"),
)
# What libraries say where memory is short. A thread that cannot start is one whose stack found no room.
SHORT = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "status_alloc_failed",
    "can't start new thread",
    "resource temporarily unavailable",
)


def available(device: torch.device = CPU) -> int:
    """Return how many bytes could be allocated on the device now."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    found: list[int | None] = [psutil.virtual_memory().available, *(_left_in_group(*names) for names in CGROUPS)]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(size for size in found if size is not None))


def _left_in_group(limit: str, usage: str, cache: str, shared: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes left below the limits of this process's control group and those around it; None without any.

    A container sees its own group at the root. Elsewhere the group's path is in /proc/self/cgroup.
    """
    folders = _group_folders((root / limit).parent)
    left = [_left_in(folder, Path(limit).name, Path(usage).name, cache, shared) for folder in folders]
    return min((size for size in left if size is not None), default=None)


def _left_in(folder: Path, limit: str, usage: str, cache: str, shared: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= 1 << 60:
            return None
        used = int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(most) - used + int(counts.get(cache, 0)) - int(counts.get(shared, 0))


def _group_folders(root: Path) -> list[Path]:
    """Return the memory controller's folders of this process's group and of all groups around it, up to the root."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    controller = "memory" if root.name == "memory" else ""  # the second version names none
    own = [root / path.lstrip("/") for _, names, path in lines if controller in names.split(",")]
    return list(
        dict.fromkeys([one for path in own for one in (path, *path.parents) if one.is_relative_to(root)] + [root])
    )


def restart_peak() -> bool:
    """Start to count the peak of this process's memory anew, and return whether that was possible.

    Where it is not, as on macOS, `peak` counts from when the process began.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """Return the most bytes of main memory that this process held since `restart_peak`, with pages of mapped files."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux, or a sandbox that knows no high-water mark
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the kernel at once.

    Activations of megabytes come and go thousands of times a second; each time the kernel would map and clear fresh
    pages, which takes as long as the elementwise operations on them. Other C libraries are left as they are.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give the kernel what glibc keeps for later, of all threads. It is called where memory is short."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, which has these settings; else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was no memory left, on a device or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT)
