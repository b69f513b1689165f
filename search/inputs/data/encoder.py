"""Turns documents into token ids, without the tokenizer's own special tokens, and into no more than are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from search.errors import reason
from search.inputs.data.leading import own_leading_tokens
from search.inputs.data.rows import Chat, Document, checked
from supernet.errors import InputError

# How many characters are encoded at once, which takes some 250 bytes of memory for each. The test set of WikiText-2,
# whose joined text others encode as one, is shorter and so is encoded as one, too.
ENCODED_CHARACTERS = 1 << 21
LEAST_CHARACTERS = 1 << 14  # how many characters are encoded at once where few tokens are needed
CHARACTERS = 8  # how many characters are taken for each token that is needed: most texts have fewer in a token
TAIL = 64  # how many tokens before a cut are not used, as they might be others if the text went on


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, the token that joins documents (`separator`, end-of-sequence), and those that begin a sequence."""

    tokenizer: PreTrainedTokenizerBase
    separator: int
    leading: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, leading: Sequence[int] = ()) -> Encoder:
        """Return the encoder for a tokenizer, which must have an end-of-sequence token."""
        separator = tokenizer.eos_token_id
        if separator is None:
            raise InputError(
                "the model's tokenizer has no end-of-sequence token, which joins documents; set eos_token in its "
                "tokenizer_config.json"
            )
        return cls(tokenizer, separator, tuple(leading))

    def text_of(self, document: Document) -> str:
        """Return the text of a document. A chat goes through the tokenizer's chat template."""
        return document if isinstance(document, str) else self._templated(document)

    def __call__(self, text: str, enough: float) -> list[int]:
        """Return at least the first `enough` tokens of a text, or all of them if it has fewer."""
        ids: list[int] = []
        for piece in cut(text, ENCODED_CHARACTERS):
            ids += self._first(piece, enough - len(ids))
            if len(ids) >= enough:
                break
        return ids

    def _first(self, text: str, enough: float) -> list[int]:
        size = max(float(LEAST_CHARACTERS), CHARACTERS * enough)
        while size < len(text):
            ids = self._encoded(text[: int(size)])
            if len(ids) >= enough + TAIL:
                return ids[: int(enough)]
            size *= 4
        return self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        # verbose=False: a document may well be longer than the model's context, as it is cut into sequences
        # afterwards.
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # whatever library the tokenizer is made of has errors of its own
            raise InputError(
                f"the model's tokenizer cannot encode the text that begins {json.dumps(text[:40])} ({reason(error)}); "
                "take it out, or use another tokenizer"
            ) from error
        return ids

    def _templated(self, chat: Chat) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{chat.where} holds chat messages, but the model's tokenizer has no chat template; take a model tuned "
                "for chat, or set data.source.text_column to a column of text"
            )
        try:
            text = self.tokenizer.apply_chat_template([dict(message) for message in chat.messages], tokenize=False)
        except Exception as error:  # templates are programs of their authors, and raise what they like
            raise InputError(
                f"{chat.where} does not fit the chat template of the model's tokenizer ({reason(error)}); give "
                "messages in the order and with the roles that it knows"
            ) from error
        # Sequences begin with such tokens already; templates write them once more.
        first = self.tokenizer.convert_ids_to_tokens(list(self.leading or own_leading_tokens(self.tokenizer)))
        return checked(str(text).removeprefix("".join(first)), chat.where)


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into consecutive pieces of at most `limit` characters, which together are the text.

    A piece ends after the last blank line in its second half; failing that, after the last line end there,
    then the last space, and only then anywhere.
    """
    start = 0
    while len(text) - start > limit:
        size = limit
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, start + limit // 2, start + limit)
            if found >= 0:
                size = found + len(separator) - start
                break
        yield text[start : start + size]
        start += size
    yield text[start:]
