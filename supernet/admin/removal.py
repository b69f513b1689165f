"""`python -m supernet gc`: removes supernets that no run refers to, and what killed processes left.

A supernet that is being built stays. So does one with anything in it, at any depth, that is not a supernet's; no link
is followed. What goes is renamed first, so that a kill in between leaves nothing that could be taken for a whole
supernet; the next call removes the rest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from supernet.admin.folders import Folder, foreign, inspect, is_locked, plain, size_of, supernet_folders
from supernet.admin.listing import readable
from supernet.errors import InputError
from supernet.manifest import FORMAT, LOCK, UNITS
from supernet.system.atomic import left_behind
from supernet.uses import USES, unreadable_uses, uses_of

# How the name of a folder ends while it is being removed; meanwhile it also starts with a dot.
REMOVED = ".removed"
# What a supernet is called while it is being removed, if nobody had renamed it before.
HALF_REMOVED = re.compile(r"\.[0-9a-f]{16}\.removed")


def collect(path: Path, dry_run: bool) -> Iterator[tuple[str, bool]]:
    """Remove what can go, or only tell it.

    Yields:
        A line for each thing that goes or is kept for a reason, and one for what that comes to; and whether it went
        well.
    """
    remove, free = ("would remove", "would free") if dry_run else ("removed", "freed")
    freed = stay = 0
    rests = _half_removed(path)
    for rest in rests:
        size = _remove(rest, dry_run) or 0
        freed += size
        yield f"{remove} {plain(rest.name)}: an interrupted gc left it ({readable(size)})", True
    for folder in _supernets(path, or_none=bool(rests)):
        name = plain(folder.name)
        try:
            reason, kept, size = _tidied(folder, dry_run)
        except Timeout:
            reason, kept, size = "", "it is being built", 0
        except (InputError, OSError) as error:  # the others are none the worse for it
            stay += 1
            yield f"kept {name}: {plain(str(error))}", False
            continue
        if reason:
            yield f"{remove} {name}: {reason} ({readable(size)})", True
        elif kept:
            yield f"kept {name}: {kept}", True
        if size and not reason:
            yield f"{remove} temporary files of killed processes in {name} ({readable(size)})", True
        freed, stay = freed + size, stay + (not reason)
    yield f"{free} {readable(freed)}; supernets that stay: {stay}", True


def _supernets(path: Path, or_none: bool) -> list[Path]:
    try:
        return supernet_folders(path)
    except InputError:
        if or_none:
            return []
        raise


def _half_removed(path: Path) -> list[Path]:
    """Return the supernets in or beside `path` that an earlier call renamed but was killed before it removed them."""
    found = [*path.glob(f".*{REMOVED}"), *path.parent.glob(f".{path.name}{REMOVED}")] if path.is_dir() else []
    folders = sorted(
        folder for folder in found if folder.is_dir() and not folder.is_symlink() and foreign(folder) is None
    )
    return [folder for folder in folders if HALF_REMOVED.fullmatch(folder.name) or any(folder.iterdir())]


def _tidied(folder: Path, dry_run: bool) -> tuple[str, str, int]:
    """Remove a supernet if no run needs it, and else what killed processes left in it.

    Returns:
        Why the supernet goes, or an empty text; why it stays, if that is worth a line, or an empty text; and the bytes
        that go.

    Raises:
        Timeout: It is being built.
    """
    if (stranger := foreign(folder)) is not None:  # not even temporary files: who knows what they are here
        return "", f"{plain(str(stranger.relative_to(folder)))} in it is not ours", 0
    with _nobody_builds(folder, dry_run):
        reason = _why_useless(inspect(folder))
        if reason and (records := unreadable_uses(folder)):
            record = f"{USES}/{records[0].name}"
            return "", f"a run may refer to it, but its record {record} is damaged; delete that file if none does", 0
        if not reason:
            return "", "", _sweep(folder, dry_run)
        size = _remove(folder, dry_run)
        return (reason, "", size) if size is not None else ("", "", 0)


@contextmanager
def _nobody_builds(folder: Path, dry_run: bool) -> Iterator[None]:
    """Keep builders out of a supernet; Timeout if one is at work. A dry run only looks whether one is."""
    if not dry_run:
        try:
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise
        except OSError as error:
            raise InputError(f"cannot lock {folder / LOCK}: {error.strerror}; nothing was removed of it") from error
        try:
            yield
        finally:
            lock.release()
    elif is_locked(folder):
        raise Timeout(str(folder / LOCK))
    else:
        yield


def _why_useless(supernet: Folder) -> str:
    if supernet.format > FORMAT or supernet.uses:  # a newer version may use it, and note that in another way
        return ""
    if supernet.format < FORMAT:
        return f"it is of format {supernet.format}, which this version cannot read"
    return "no run refers to it"


def _remove(folder: Path, dry_run: bool) -> int | None:
    """Remove a folder and return the bytes that it had.

    None where it stays, as meanwhile a run has come to use it or somebody has put something into it.
    """
    size = size_of(folder)
    if dry_run:
        return size
    try:
        gone = folder if folder.name.endswith(REMOVED) else folder.rename(folder.with_name(f".{folder.name}{REMOVED}"))
        # A use may have been noted since we looked, or a file put there. Who comes later finds no folder of this name.
        if gone != folder and (any(use.counts for use in uses_of(gone)) or foreign(gone) is not None):
            gone.rename(folder)
            return None
        shutil.rmtree(gone)
    except OSError as error:
        raise InputError(f"cannot remove {folder}: {error.strerror}") from error
    return size


def _sweep(folder: Path, dry_run: bool) -> int:
    """Remove temporary files that killed processes left, and return the bytes that they had."""
    files = [file for place in (folder, folder / UNITS, folder / USES) for file in left_behind(place)]
    size = sum(file.lstat().st_size for file in files)
    for file in files if not dry_run else ():
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot remove {file}: {error.strerror}") from error
    return size
