"""Where text comes from: CPython's own documentation, files of this machine, data sets of the hub."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as pydoc_topics
from typing import Protocol, TypeVar

import numpy as np
import pyarrow.parquet as pq

from search.errors import reason
from supernet.errors import InputError

PARTS = ("calibration", "search", "evaluation")

T = TypeVar("T")


class TextSource(Protocol):
    """Documents of text, in one or several named splits."""

    @property
    def splits(self) -> Mapping[str, str]:
        """The split that feeds each part. Parts may name the same split: it is then divided among them."""

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The documents of a split, in an order that the seed determines.

        Raises:
            InputError: the text cannot be had, or there is none.
        """


@dataclass(frozen=True)
class PydocTopics:
    """The language reference that CPython carries for `help()`: some 0.4 MB of English, a document per topic.

    Topics quote each other (`compound` holds all of `if`, `for`, `while`, ...), which would carry the same
    text into several parts. So each paragraph is kept once, in the longest topic that has it.
    """

    @property
    def splits(self) -> Mapping[str, str]:
        """One split feeds all parts."""
        return dict.fromkeys(PARTS, "topics")

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The topics, each without the paragraphs that a longer one has, shuffled."""
        seen: set[str] = set()
        documents = []
        for topic in sorted(pydoc_topics.topics.values(), key=lambda text: (-len(text), text)):
            paragraphs = {" ".join(text.split()): text for text in re.split(r"\n\s*\n", topic)}
            documents.append("\n\n".join(text for key, text in paragraphs.items() if key not in seen))
            seen.update(paragraphs)
        return shuffled([document for document in documents if document.strip()], np.random.default_rng(seed))


@dataclass(frozen=True)
class LocalText:
    """A `.txt` file (one document), a `.jsonl` or `.parquet` file (a document per row), or a folder of such.

    Files are taken in an order that the seed gives and read one at a time; rows are shuffled within theirs.

    Attributes:
        path: the file or folder; relative paths start at the working directory.
        text_column: the key (`.jsonl`) or column (`.parquet`) that holds the text.
        evaluation_path: a file or folder for the evaluation part alone; by default `path` is divided among
            all parts.
    """

    path: str
    text_column: str = "text"
    evaluation_path: str | None = None

    @property
    def splits(self) -> Mapping[str, str]:
        """The splits are called like the two settings."""
        splits = dict.fromkeys(PARTS, "path")
        return splits if self.evaluation_path is None else splits | {"evaluation": "evaluation_path"}

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The documents of the files under `path` or `evaluation_path`, file by file."""
        root: str = getattr(self, split)
        generator = np.random.default_rng(seed)
        empty = True
        for file in shuffled(_text_files(root, setting=f"data.source.{split}"), generator):
            for document in shuffled(_read(file, self.text_column), generator):
                empty = empty and not document.strip()
                yield document
        if empty:
            raise InputError(f"data.source.{split}={root} holds no text; give files with text in them")


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set of the Hugging Face hub (or a local folder that `datasets` understands), streamed: a sample
    costs a sample.

    Attributes:
        path: the data set, such as "allenai/c4".
        name: its configuration, such as "en".
        text_column: the column that holds the text.
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

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The texts of the split's rows, or these joined to one document."""
        texts = (_text_of(row, self.text_column, where=f"{self.path}, split {split}") for row in self._rows(split, seed))
        yield from texts if self.join is None else iter([self.join.join(texts)])

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
                f"data.source.path={self.path}, split {split}, cannot be read ({reason(error)}); "
                "check name and network, or take text from here: data=local data.source.path=FOLDER"
            ) from error


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """The items in an order that the generator gives; numpy itself would make arrays of them."""
    return (items[index] for index in generator.permutation(len(items)))


def _text_files(root: str, setting: str) -> list[Path]:
    """The file `root`, or all files with a known ending in the folder `root` and below it, sorted.

    Raises:
        InputError: there is no such path, its ending is unknown, or the folder has no file with a known one.
    """
    path, known = Path(root).expanduser(), ", ".join(_READERS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise InputError(f"{setting}={root} is a folder without a text file; give one with files ending in {known}")
        return files
    if not path.is_file():
        raise InputError(f"{setting}={root} does not exist; give a file or folder with text ({known})")
    if path.suffix not in _READERS:
        raise InputError(f"{setting}={root} has an unknown ending; give a folder or a file ending in {known}")
    return [path]


def _read(file: Path, column: str) -> list[str]:
    """The documents of a file."""
    try:
        return _READERS[file.suffix](file, column)
    # ValueError is what a wrong encoding, broken JSON and a file that is not Parquet have in common.
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({reason(error)}); give what its ending says, in UTF-8") from error


def _read_txt(file: Path, column: str) -> list[str]:
    return [file.read_text(encoding="utf-8")]


def _read_jsonl(file: Path, column: str) -> list[str]:
    documents = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{where} is not JSON ({error}); give one object a line") from error
                documents.append(_text_of(row, column, where))
    return documents


def _read_parquet(file: Path, column: str) -> list[str]:
    columns = pq.read_schema(file).names
    if column not in columns:
        raise InputError(_no_column(column, columns, str(file)))
    rows = pq.read_table(file, columns=[column]).to_pylist()
    return [_text_of(row, column, str(file)) for row in rows]


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text_of(row: object, column: str, where: str) -> str:
    """The text in a column of a row; a missing value (null) counts as no text."""
    if not isinstance(row, Mapping):
        raise InputError(f'{where} is not an object; give rows such as {{"{column}": "..."}}')
    if column not in row:
        raise InputError(_no_column(column, row, where))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: {column} holds {type(text).__name__}; set data.source.text_column to a column of text")
    return text or ""


def _no_column(column: str, columns: Iterable[object], where: str) -> str:
    names = ", ".join(map(str, columns))
    return f"{where} has no column {column}; set data.source.text_column to one of: {names}"
