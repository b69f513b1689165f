"""Where text comes from: CPython's own documentation, files of this machine, data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pydoc_data import topics as pydoc_topics
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch

from search.errors import reason
from search.inputs.data.files import read, text_files
from search.inputs.data.rows import Document, document_of
from search.inputs.data.shuffling import shuffled
from supernet.errors import InputError

if TYPE_CHECKING:
    from search.inputs.models.loaded import LoadedModel

PARTS = ("calibration", "search", "evaluation")


class TextSource(Protocol):
    """Documents of text, in one or several named splits."""

    def for_model(self, loaded: LoadedModel, device: torch.device, writes: bool = True) -> TextSource:
        """Return the source for a run that works on this model, on this device. Called once, before `documents`.

        Without `writes`, as in a dry run, no model writes text; placeholders stand for what it would write.
        """

    @property
    def splits(self) -> Mapping[str, str]:
        """The split that feeds each part. Parts may name the same split: it is then divided among them."""

    def documents(self, split: str, seed: int) -> Iterator[Document]:
        """The documents of a split, in an order that the seed determines.

        Raises:
            InputError: the text cannot be had, or there is none.
        """


class SameForAll:
    """The base class of sources whose text does not depend on the model."""

    def for_model(self, loaded: LoadedModel, device: torch.device, writes: bool = True) -> Self:
        """Return the source itself."""
        return self


@dataclass(frozen=True)
class PydocTopics(SameForAll):
    """The language reference that CPython carries for `help()`: some 0.4 MB of English, a document per topic.

    Topics quote each other (`compound` holds all of `if`, `for`, `while`, ...), which would carry the same
    text into several parts. So each paragraph is kept once, in the longest topic that has it.
    """

    @property
    def splits(self) -> Mapping[str, str]:
        """One split feeds all parts."""
        return dict.fromkeys(PARTS, "topics")

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """Yield the topics, each without the paragraphs that a longer one has, shuffled."""
        seen: set[str] = set()
        documents = []
        for topic in sorted(pydoc_topics.topics.values(), key=lambda text: (-len(text), text)):
            paragraphs = {" ".join(text.split()): text for text in re.split(r"\n\s*\n", topic)}
            documents.append("\n\n".join(text for key, text in paragraphs.items() if key not in seen))
            seen.update(paragraphs)
        return shuffled([document for document in documents if document.strip()], np.random.default_rng(seed))


@dataclass(frozen=True)
class LocalText(SameForAll):
    """A `.txt` file (one document), a `.jsonl` or `.parquet` file (a document per row), or a folder of such.

    Files are taken in an order that the seed gives and read one at a time; rows are shuffled within theirs. Of files
    beyond 16 MiB only as much is read as is needed: a `.txt` is then taken as sections of 64 KiB, a document each, and
    of rows those that are stored side by side are shuffled together.

    Attributes:
        path: the file or folder; relative paths start at the working directory.
        text_column: the key (`.jsonl`) or column (`.parquet`) that holds the text, or a chat: a list of messages with
            role and content, which the chat template of the model's tokenizer makes a text.
        evaluation_path: a file or folder for the evaluation part alone; by default `path` is divided among
            all parts.
    """

    path: str
    text_column: str = "text"
    evaluation_path: str | None = None

    def __post_init__(self) -> None:
        _check_text("path", self.path, "a file or folder with text")
        _check_text("text_column", self.text_column, "the name of a column, such as text")
        if self.evaluation_path is not None:
            _check_text("evaluation_path", self.evaluation_path, "a file or folder with text, or null")

    @property
    def splits(self) -> Mapping[str, str]:
        """The splits are called like the two settings."""
        splits = dict.fromkeys(PARTS, "path")
        return splits if self.evaluation_path is None else splits | {"evaluation": "evaluation_path"}

    def documents(self, split: str, seed: int) -> Iterator[Document]:
        """Yield the documents of the files under `path` or `evaluation_path`, file by file."""
        root: str = getattr(self, split)
        generator = np.random.default_rng(seed)
        empty = True
        for file in shuffled(text_files(root, setting=f"data.source.{split}"), generator):
            for document in read(file, self.text_column, generator):
                empty = empty and isinstance(document, str) and (not document or document.isspace())
                yield document
        if empty:
            raise InputError(f"data.source.{split}={root} holds no text; give files with text in them")


@dataclass(frozen=True, kw_only=True)
class HubText(SameForAll):
    """A data set of the Hugging Face hub, or a local folder that `datasets` understands.

    It is streamed, so that a sample can be read without downloading the whole.

    Attributes:
        path: the data set, such as "allenai/c4".
        name: its configuration, such as "en".
        text_column: the column that holds the text, or a chat: a list of messages with role and content.
        splits: the split that feeds each part.
        revision: branch, tag or commit.
        join: with a string, the rows of a split in their order, joined by it, are one document.
        shuffle_buffer: rows among which the stream is shuffled; as many are downloaded before the first one
            comes out.
    """

    path: str
    splits: Mapping[str, str]
    name: str | None = None
    text_column: str = "text"
    revision: str | None = None
    join: str | None = None
    shuffle_buffer: int = 1_000

    def __post_init__(self) -> None:
        _check_text("path", self.path, "a data set of the hub, such as allenai/c4")
        _check_text("text_column", self.text_column, "the name of a column, such as text")
        for name in ("name", "revision"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name), "a name, or null")
        if not isinstance(self.splits, Mapping) or set(self.splits) != set(PARTS):
            example = "{calibration: train, search: train, evaluation: test}"
            raise InputError(f"data.source.splits={self.splits} must name the split of each part, such as {example}")
        for part, split in self.splits.items():
            _check_text(f"splits.{part}", split, "the name of a split, such as train")
        if self.join is not None and type(self.join) is not str:
            raise InputError(f"data.source.join={self.join} must be the text to put between rows, or null")
        if type(self.shuffle_buffer) is not int or self.shuffle_buffer < 1:
            raise InputError(
                f"data.source.shuffle_buffer={self.shuffle_buffer} must be a whole number of rows from 1 on"
            )

    def documents(self, split: str, seed: int) -> Iterator[Document]:
        """Yield the documents of the split's rows, or one document of all their texts if they are joined."""
        where = f"{self.path}, split {split}"
        documents = (document_of(row, self.text_column, where) for row in self._rows(split, seed))
        yield from documents if self.join is None else iter([self._joined(documents)])

    def _joined(self, documents: Iterator[Document]) -> str:
        texts = []
        for document in documents:
            if not isinstance(document, str):
                raise InputError(f"{document.where}: chats cannot be joined; use data.source.join=null")
            texts.append(document)
        return str(self.join).join(texts)

    def _rows(self, split: str, seed: int) -> Iterator[Mapping[str, object]]:
        import datasets  # seconds to import, and only this source needs it

        try:
            rows = datasets.load_dataset(self.path, self.name, split=split, revision=self.revision, streaming=True)
            yield from (rows if self.join is not None else rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer))
        # Whatever goes wrong between here and the hub's servers (names, rights, network, formats: five
        # libraries with exceptions of their own) has the same remedy, and nothing of ours runs inside this
        # block.
        except Exception as error:
            raise InputError(
                f"data.source.path={self.path}, split {split}, cannot be read ({reason(error)}); check name and "
                "network, or take text from here: data=local data.source.path=FOLDER"
            ) from error


def _check_text(name: str, value: object, what: str) -> None:
    if type(value) is not str or not value.strip():
        raise InputError(f"data.source.{name}={value} must be {what}")
