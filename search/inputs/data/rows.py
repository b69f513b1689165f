"""A document as one row of a file or data set holds it: a text, or a chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.errors import nearest
from supernet.errors import InputError


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, which the chat template of the model's tokenizer turns into a text.

    Attributes:
        messages: The messages, mappings with at least the key `role`.
        where: The row that they come from, for what is told the user.
    """

    messages: Sequence[Mapping[str, Any]]
    where: str


Document = str | Chat


def document_of(row: object, column: str, where: str) -> Document:
    """Return the document in a column of a row. A missing value (null) counts as an empty text."""
    if not isinstance(row, Mapping):
        raise InputError(f'{where} is not an object; give rows such as {{"{column}": "..."}}')
    if column not in row:
        raise no_column(column, row, where)
    value = row[column]
    if isinstance(value, list):
        return _chat(value, column, where)
    if value is not None and not isinstance(value, str):
        found = f"{where}: {column} holds {type(value).__name__}"
        raise InputError(f"{found}; set data.source.text_column to a column of text, or of chat messages")
    return checked(value or "", where)


def checked(text: str, where: str) -> str:
    """Return the text if it can be encoded; else raise InputError.

    JSON may hold halves of a surrogate pair, which are no characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(
            f"{where} holds {half}, half of a surrogate pair, which is no character; take it out"
        ) from error
    return text


def _chat(value: list[Any], column: str, where: str) -> Chat:
    if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value):
        example = '[{"role": "user", "content": "..."}, ...]'
        raise InputError(
            f"{where}: {column} is a list, but not of chat messages; give texts, or messages such as {example}"
        )
    # Parquet fills keys that only other messages have with null, which templates would take for given.
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    return Chat(messages, where)


def no_column(column: str, columns: Iterable[object], where: str) -> InputError:
    """Return the error for a column that does not exist, with the nearest names first."""
    names = ", ".join(map(str, columns))
    near = nearest(column, map(str, columns)).split(", ")[0] if names else ""
    hint = f" (did you mean {near}?)" if near and near != names else ""
    return InputError(f"{where} has no column {column}; set data.source.text_column to one of: {names}{hint}")
