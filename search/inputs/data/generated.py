"""Text that the dense model itself writes: calibration without any data, in whatever languages the model knows.

As in "Self-calibration for Language Model Quantization and Pruning" (Williams et al., 2024), text is sampled from what
the model predicts, from the very first token on; and as in Magpie (Xu et al., 2024), a model tuned for chat also writes
conversations, from nothing but the beginning of a user's turn. It is made once for a model and kept in the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from search.errors import reason
from search.inputs.data.leading import own_leading_tokens
from search.inputs.data.sources import PARTS
from search.inputs.models.loaded import LoadedModel
from search.paths import cache_dir
from supernet.errors import InputError
from supernet.system.records import UnreadableError, read_record, write_record

log = logging.getLogger(__name__)

ROWS = 32  # written together: the weights are read from memory once for all
GRAM = 4  # tokens
DISTINCT = 0.5  # share of a document's groups of four tokens that differ: with fewer it repeats itself
BARREN = 4  # batches in a row without a new document: more would bring hardly any
SHORTEST = 16  # tokens of a document
BETWEEN_DOCUMENTS = "<|endoftext|>"
PROBE = "@question@"  # a user's message in the chat template, to see what stands before it
VERSION = 1  # of what is written with the same settings: a change of it makes the text anew


@dataclass(frozen=True)
class GeneratedText:
    """Documents that the dense model writes, as many as are asked for.

    A row of tokens begins with what the model's texts begin with, and goes on with tokens drawn from the model's own
    predictions. Where the model ends a text and begins another, a new document begins. Documents that go round in
    circles are left out.

    Attributes:
        temperature: Divides the logits: below 1 the text is more coherent, and less varied.
        top_p: Tokens are drawn from the most probable ones, which together have this probability.
        tokens: In a row.
        chat: Share of the rows that are conversations, where the tokenizer has a chat template.
        writer: The model with its tokenizer, which a run gives it.
        device: Where the model writes.
        writes: Whether the model writes what is not in the cache; placeholders of about the same length else.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    tokens: int = 256
    chat: float = 0.0
    # Not for what errors call the source: a model prints all its layers.
    writer: LoadedModel | None = field(default=None, repr=False)
    device: torch.device = field(default=torch.device("cpu"), repr=False)
    writes: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        for name, example in (("temperature", 1.0), ("top_p", 0.95), ("chat", 0.5)):
            if type(getattr(self, name)) not in (int, float):
                raise InputError(f"data.source.{name}={getattr(self, name)} must be a number, such as {example}")
        if not 0.0 < self.temperature < 100.0:
            raise InputError(f"data.source.temperature={self.temperature} must be above 0, such as 1.0")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"data.source.top_p={self.top_p} must be above 0 and at most 1; 1 leaves no token out")
        if not 0.0 <= self.chat <= 1.0:
            raise InputError(f"data.source.chat={self.chat} must be a share from 0 to 1, such as 0.5")
        if type(self.tokens) is not int or self.tokens < SHORTEST:
            raise InputError(f"data.source.tokens={self.tokens} must be a whole number of at least {SHORTEST}")

    @property
    def splits(self) -> Mapping[str, str]:
        """One split feeds all parts."""
        return dict.fromkeys(PARTS, "all")

    def for_model(self, loaded: LoadedModel, device: torch.device, writes: bool = True) -> GeneratedText:
        """Return the same text source with the model that writes."""
        return replace(self, writer=loaded, device=device, writes=writes)

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """Different documents without end, a batch of rows at a time.

        Raises:
            InputError: The model writes nothing but repetitions, or hardly anything that it has not written before, as
                it does at low temperatures.
        """
        assert self.writer is not None, "for_model comes first"
        owed = list[int]()
        try:
            yield from self._new_documents(self.writer, seed, owed)
        finally:  # the reader takes no more
            if owed:
                log.info("text: %s will write about %s tokens first", self.writer.name, f"{sum(owed):,}")

    def _new_documents(self, writer: LoadedModel, seed: int, owed: list[int]) -> Iterator[str]:
        """What `documents` yields; `owed` takes how many tokens are not written, as `writes` is off."""
        folder, known, barren = self._folder(writer, seed), set[str](), 0
        for number in count():
            texts = self._batch(folder / f"{number:05}.json", writer, seed, number, owed)
            new = [text for text in dict.fromkeys(texts) if text not in known and not text.isspace()]
            barren = 0 if new else barren + 1
            if barren == BARREN:
                raise InputError(
                    f"{writer.name} writes nothing but repetitions, which are no calibration text; take another: "
                    "data=prose, or data=local data.source.path=FOLDER"
                )
            known.update(new)
            yield from new

    def _folder(self, writer: LoadedModel, seed: int) -> Path:
        """Where the text of this model with these settings is kept."""
        settings = [VERSION, writer.fingerprint, str(writer.model.dtype), self.temperature, self.top_p, self.tokens]
        settings += [self.chat, seed, ROWS, writer.tokenizer.chat_template, len(writer.tokenizer)]
        return cache_dir() / "texts" / xxhash.xxh3_128_hexdigest(repr(settings).encode())

    def _batch(self, file: Path, writer: LoadedModel, seed: int, number: int, owed: list[int]) -> list[str]:
        """The documents of a batch of rows: from the cache, or written now; `owed` takes the tokens not written."""
        try:
            found = read_record(file)
            if found is not None:
                return list(found["texts"])
        except (UnreadableError, KeyError, TypeError) as error:
            log.warning("%s is not as it was written (%s); the text is made again", file, error)
        if not self.writes:
            owed.append(ROWS * self.tokens)
            return [f"placeholder {number}.{row}" + " text" * self.tokens for row in range(ROWS)]
        if number == 0:
            log.info("text: %s writes it, once; it is kept in %s", writer.name, file.parent)
        begun = time.monotonic()
        texts = self._written(writer, int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        tokens, seconds = ROWS * self.tokens, max(time.monotonic() - begun, 1e-3)
        log.info("text: %s more tokens written, %.0f a second", f"{tokens:,}", tokens / seconds)
        write_record(file, {"texts": texts})
        return texts

    def _written(self, writer: LoadedModel, seed: int) -> list[str]:
        """The documents of a new batch of rows."""
        tokenizer, generator = writer.tokenizer, torch.Generator().manual_seed(seed)
        turn = chat_beginning(tokenizer)
        chats = 0 if turn is None else round(ROWS * self.chat)
        texts = list[str]()
        if turn is not None and chats:
            rows = self._sampled(writer, turn, chats, generator).tolist()
            texts += [str(tokenizer.decode([*turn, *row])) for row in rows if not repeats(row)]
        if chats < ROWS:
            rows = self._sampled(writer, plain_beginning(tokenizer), ROWS - chats, generator).tolist()
            special = tokenizer.all_special_ids
            texts += [str(tokenizer.decode(piece)) for row in rows for piece in pieces_of(row, special)]
        return texts

    @torch.no_grad()
    def _sampled(self, writer: LoadedModel, beginning: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
        """The tokens that follow a beginning, (rows, tokens) int64, drawn from what the model predicts."""
        home = writer.model.device
        try:
            model = writer.model.to(self.device)  # type: ignore[arg-type]
            return self._continued(model, writer.name, beginning, rows, generator)
        finally:
            writer.model.to(home)  # type: ignore[arg-type]

    def _continued(
        self, model: PreTrainedModel, name: str, beginning: Sequence[int], rows: int, generator: torch.Generator
    ) -> Tensor:
        """What `_sampled` returns, by a model that is on the device."""
        ids = torch.tensor([beginning] * rows, device=self.device)
        drawn, past = list[Tensor](), dict[str, Any]()
        for _ in range(self.tokens):
            found = model(input_ids=ids, use_cache=True, **past)
            cache = "past_key_values" if "past_key_values" in found else "cache_params"  # of a state-space model
            past = {cache: found[cache]}
            logits = found.logits[:, -1].float().cpu()
            # A model may rule tokens out with -inf, but neither all of them nor by NaN.
            if not bool(logits.amax(-1).isfinite().all()):
                raise InputError(f"{name}: logits are not finite; check the model's weights, or use dtype=float32")
            ids = self._drawn(logits, generator).to(self.device)
            drawn.append(ids)
        return torch.cat(drawn, dim=1)

    def _drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token for each row of logits, (rows, vocabulary): (rows, 1)."""
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1.0:
            ranked, order = probabilities.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked > self.top_p] = 0.0
            probabilities = torch.zeros_like(ranked).scatter_(-1, order, ranked)
        return torch.multinomial(probabilities, 1, generator=generator)


def plain_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that begin a document of the text that a model was first trained on.

    That is what the tokenizer puts before a text. Where that is nothing, it is the token between two documents, which
    in models tuned for chat is another one than that which ends a turn.
    """
    own = own_leading_tokens(tokenizer)
    if own:
        return list(own)
    special = {token: index for index, token in tokenizer.added_tokens_decoder.items()}
    named = [index for token, index in special.items() if str(token) == BETWEEN_DOCUMENTS]
    first = named[0] if named else tokenizer.bos_token_id
    return [tokenizer.eos_token_id if first is None else first]


def chat_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return what stands before a user's first words in a chat; None if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False))
    except Exception as error:  # templates are programs of their authors, and raise what they like
        log.warning("no conversations are written, as the chat template of the model fails (%s)", reason(error))
        return None
    before, found, _ = text.partition(PROBE)
    return tokenizer(before, add_special_tokens=False)["input_ids"] or None if found else None


def pieces_of(row: Sequence[int], special: Sequence[int]) -> Iterator[list[int]]:
    """The documents in a row of tokens, parted by special tokens, without short ones and those that repeat."""
    for is_special, tokens in groupby(row, set(special).__contains__):
        piece = list(tokens)
        if not is_special and not repeats(piece):
            yield piece


def repeats(tokens: Sequence[int]) -> bool:
    """Return whether a document goes round in circles, or is too short to tell."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(tokens) < SHORTEST or len(set(grams)) < DISTINCT * len(grams)
