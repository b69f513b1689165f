"""Reads text files, and no more of them than is asked for.

A file of ordinary size is read whole. A large one is visited in pieces, in an order that the generator gives, so that a
sample of it costs a sample, from all over the file.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from search.errors import reason
from search.inputs.data.rows import Document, checked, document_of, no_column
from search.inputs.data.shuffling import shuffled
from supernet.errors import InputError

log = logging.getLogger(__name__)

LARGE = 16 << 20  # bytes beyond which a file is visited in pieces, and the most bytes of a row that are read
SECTION = 64 << 10  # bytes of a large .txt that make a document: several sequences of 4,096 tokens
BLOCK = 1 << 20  # bytes of a large .jsonl whose rows are shuffled together
ROWS = 1024  # how many rows of a large .parquet are shuffled together
MANY_ROWS = 1 << 16
WINDOW = 4096  # bytes in which a line end or a blank is looked for, to cut there

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z")
KINDS = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
Where = Callable[[], str]


def text_files(root: str, setting: str) -> list[Path]:
    """Return the file `root`, or all files with a known ending in the folder `root` and below it, sorted.

    Raises:
        InputError: There is no such path, it is no file or folder, its ending is unknown, or the folder has no text
            file.
    """
    path, known = Path(root).expanduser(), ", ".join(READERS)
    try:
        if path.is_dir():
            return _files_below(path, f"{setting}={root}")
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{setting}={root} does not exist; give a file or folder with text ({known})") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{setting}={root} cannot be read ({reason(error)}); give a file or folder with text"
        ) from error
    for of_kind, words in KINDS.items():
        if of_kind(mode):
            raise InputError(
                f"{setting}={root} is {words}, not a file; write the text to a file and give that ({known})"
            )
    if path.suffix.lower() not in READERS:
        raise InputError(f"{setting}={root} has an unknown ending; {_instead(path)}")
    return [path]


def _instead(path: Path) -> str:
    if path.suffix.lower() in PACKED:
        return f"it is compressed: unpack it, and give the unpacked file, ending in {', '.join(READERS)}"
    if path.suffix == ".json":
        return "where it has one object a line, call it .jsonl; otherwise write a line for each document"
    return f"give a folder or a file ending in {', '.join(READERS)}"


def _files_below(folder: Path, given: str) -> list[Path]:
    found, packed = [], 0
    todo = [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in READERS and entry.is_file():
                    found.append(entry.path)
                packed += entry.name.lower().endswith((*PACKED, ".json"))
    if not found:
        hint = f" (of its files {packed} are compressed, or .json: unpack them, or call them .jsonl)" if packed else ""
        raise InputError(
            f"{given} is a folder without a text file{hint}; give one with files ending in {', '.join(READERS)}"
        )
    if packed:
        log.warning("%s: %d files that are compressed, or .json, are passed over", given, packed)
    found.sort(key=lambda name: name.replace(os.sep, "\0"))  # folder by folder
    return [Path(name) for name in found]


def read(file: Path, column: str, generator: np.random.Generator) -> Iterator[Document]:
    """Yield the documents of a file, in an order that the generator gives."""
    documents = READERS[file.suffix.lower()](file, column, generator)
    while True:
        try:
            document = next(documents)
        except StopIteration:
            return
        except PermissionError as error:
            raise InputError(
                f"{file} may not be read ({reason(error)}); give yourself the right to: chmod u+r"
            ) from error
        # These are what wrong encodings, broken files and pyarrow raise.
        except (OSError, ValueError, pa.ArrowException, RecursionError, MemoryError) as error:
            raise InputError(f"{file} cannot be read ({reason(error)}); give what its ending says, in UTF-8") from error
        yield document


def _read_txt(file: Path, column: str, generator: np.random.Generator) -> Iterator[Document]:
    size = file.stat().st_size
    if size <= LARGE:
        yield _text(file.read_bytes(), file, 0)
        return
    with file.open("rb") as content:
        for section in generator.permutation(-(-size // SECTION)):
            start, stop = (_edge(content, int(number) * SECTION, size) for number in (section, section + 1))
            content.seek(start)
            yield _text(content.read(stop - start), file, start)


def _edge(content: object, offset: int, size: int) -> int:
    """Return where to cut near an offset: behind a line end, else behind a blank, else before a character."""
    if offset in (0, size) or offset > size:
        return min(offset, size)
    content.seek(offset)  # type: ignore[attr-defined]
    window: bytes = content.read(WINDOW)  # type: ignore[attr-defined]
    for separator in (b"\n", b" "):
        found = window.find(separator)
        if found >= 0:
            return offset + found + 1
    return offset + next((index for index, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _text(data: bytes, file: Path, start: int) -> str:
    """Return the text of some bytes of a file that begin at `start`; line ends become those of Unix."""
    if start == 0:
        data = _without_mark(data, file)
    if b"\0" in data:
        line = _line(file, start + data.index(b"\0"))
        raise InputError(
            f"{file}, line {line} holds a NUL byte, so this is no UTF-8 text; give a text file (UTF-16: convert it)"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(file, start + error.start, error)) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_mark(data: bytes, file: Path) -> bytes:
    """Return the first bytes of a file without UTF-8's byte order mark; InputError if they are in another encoding."""
    for mark, name in ENCODINGS.items():
        if data.startswith(mark):
            raise InputError(f"{file} cannot be read (it is {name}); convert it to UTF-8: iconv -f {name} -t UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _not_utf8(file: Path, offset: int, error: UnicodeDecodeError) -> str:
    return (
        f"{file}, line {_line(file, offset)} cannot be read ({error.reason}, byte {error.object[error.start]:#04x}): "
        "it is not UTF-8; convert it, from Latin-1 with iconv -f LATIN1 -t UTF-8"
    )


def _line(file: Path, offset: int) -> int:
    """Return the number of the line that an offset is on, from 1."""
    lines, left = 1, offset
    with file.open("rb") as content:
        while left > 0 and (data := content.read(min(left, BLOCK))):
            lines, left = lines + data.count(b"\n"), left - len(data)
    return lines


def _read_jsonl(file: Path, column: str, generator: np.random.Generator) -> Iterator[Document]:
    size = file.stat().st_size
    if size <= LARGE:
        data = _without_mark(file.read_bytes(), file).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = enumerate(data.split(b"\n"), start=1)
        rows = [_row(line, column, partial(_at, file, number)) for number, line in lines if line.strip()]
        yield from shuffled(rows, generator)
        return
    for block in generator.permutation(-(-size // BLOCK)):
        yield from shuffled(_rows_of_block(file, column, int(block) * BLOCK), generator)


def _at(file: Path, line: int) -> str:
    return f"{file}, line {line}"


def _rows_of_block(file: Path, column: str, start: int) -> list[Document]:
    """Return the rows whose lines begin within the block of a file that begins at `start`."""
    with file.open("rb") as content:
        content.seek(max(0, start - 1))
        data = content.read(BLOCK + (start > 0))
        if start:  # the line that is under way belongs to a block before, unless it ends right here
            head, newline, data = data.partition(b"\n")
            start += len(head) + len(newline) - 1
        else:
            data, start = _without_mark(data, file), len(data) - len(_without_mark(data, file))
        if data and not data.endswith(b"\n"):
            data += content.readline(LARGE)
    rows = []
    for line in data.split(b"\n"):
        if line.strip():
            rows.append(_row(line, column, lambda begin=start: _at(file, _line(file, begin))))  # type: ignore[misc]
        start += len(line) + 1
    return rows


def _row(line: bytes, column: str, where: Where) -> Document:
    if b"\0" in line:
        raise InputError(f"{where()} holds a NUL byte, so this is no UTF-8 text; give a text file (UTF-16: convert it)")
    try:
        if len(line) >= LARGE:
            return _long_row(line.decode(errors="ignore"), column, where)
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where()} cannot be read ({error.reason}): it is not UTF-8; convert it with iconv"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where()} is nested too deeply; give one flat object a line") from error
    except ValueError as error:
        raise InputError(f"{where()} is not JSON ({reason(error)}); give one object a line") from error
    plain = isinstance(row, dict) and isinstance(row.get(column), str) and row[column].isascii()
    return row[column] if plain else document_of(row, column, where())


def _long_row(line: str, column: str, where: Where) -> str:
    """Return the beginning of a text whose row is too long to be read whole; what precedes it there must be short."""
    decoder, at = json.JSONDecoder(), line.index("{") + 1
    while True:
        at = _skip(line, at, ",")
        if line[at : at + 1] != '"':
            raise no_column(column, (), where())
        key, at = scanstring(line, at + 1, True)
        at = _skip(line, at, ":")
        if key == column and line[at : at + 1] == '"':
            return checked(_string_from(line, at + 1), where())
        _, at = decoder.raw_decode(line, at)


def _skip(line: str, at: int, separator: str) -> int:
    found = re.compile(rf"\s*{separator}?\s*").match(line, at)
    return found.end() if found else at


def _string_from(line: str, start: int) -> str:
    """Return the JSON string whose contents begin at `start`, as far as the line goes."""
    try:
        return str(scanstring(line, start, True)[0])
    # It goes on behind the end. What is left out is an escape that is cut, or half of a surrogate pair.
    except json.JSONDecodeError:
        body = line[start:]
        cut = re.search(r"(?:\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{0,3})$", body[-12:])
        body = body[: len(body) - (len(cut.group()) if cut else 0)]
        odd = (len(body) - len(body.rstrip("\\"))) % 2
        return str(scanstring(body[: len(body) - odd] + '"', 0, True)[0])


def _read_parquet(file: Path, column: str, generator: np.random.Generator) -> Iterator[Document]:
    with pq.ParquetFile(file) as content:
        names = content.schema_arrow.names
        if column not in names:
            raise no_column(column, names, str(file))
        groups = [content.metadata.row_group(index) for index in range(content.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size <= LARGE and content.metadata.num_rows <= MANY_ROWS:
            yield from _rows(content.read(columns=[column]), column, file, generator)
            return
        for group in generator.permutation(len(groups)):
            for batch in content.iter_batches(ROWS, row_groups=[int(group)], columns=[column]):
                yield from _rows(batch, column, file, generator)


def _rows(table: pa.Table, column: str, file: Path, generator: np.random.Generator) -> Iterator[Document]:
    return shuffled([document_of(row, column, str(file)) for row in table.to_pylist()], generator)


READERS: dict[str, Callable[[Path, str, np.random.Generator], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
