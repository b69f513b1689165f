"""A folder that appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from supernet.errors import InputError


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yield a draft beside the folder, which takes its place at the end; after an error all is as it was before.

    What a process that was killed in here left behind is swept away by the next one, and an older folder that it had
    set aside comes back.

    Raises:
        InputError: The system does not let us write.
    """
    draft, older = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        _clear(folder, draft, older)
        draft.mkdir(parents=True)
        yield draft
        _swap(draft, folder, older)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers library raises for a file that it cannot write
            raise _cannot_write(folder, error) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _clear(folder: Path, draft: Path, older: Path) -> None:
    """Remove what a killed process left behind; an older folder that it had set aside comes back."""
    shutil.rmtree(draft, ignore_errors=True)
    if older.exists() and not folder.exists():
        os.replace(older, folder)
    shutil.rmtree(older, ignore_errors=True)


def _swap(draft: Path, folder: Path, older: Path) -> None:
    """Put the draft in the place of the folder. What was there is gone only when the draft is in place."""
    if folder.exists():
        os.replace(folder, older)
    try:
        os.replace(draft, folder)
    except OSError:
        if older.exists():
            os.replace(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _cannot_write(folder: Path, error: Exception) -> InputError:
    why = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"cannot write {folder}: {why}; free some space or choose another folder")
