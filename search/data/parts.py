"""Documents dealt to the parts, tokenised, and packed into sequences of equal length.

What a part consists of depends on the source, the tokenizer and the seed alone.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from search.data.leading import leading_tokens
from search.data.sources import PARTS, TextSource, shuffled
from supernet.errors import InputError

# Documents that several parts share are cut to this length (about 2,000 tokens of English), so that one long
# document does not end up in one part only. Longer pieces keep more context within a sequence, shorter ones
# share more evenly.
PIECE_CHARACTERS = 8_192

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one part.

    Attributes:
        ids: int64 [sequences, sequence_length]: the leading tokens, then documents joined with the end-of-sequence token.
        documents: how many documents, or pieces of cut ones, the tokens come from.
        fingerprint: a hash of `ids` and `leading`.
        leading: how many special tokens (BOS) begin every sequence.
    """

    ids: torch.Tensor
    documents: int
    fingerprint: str
    leading: int = 0

    @property
    def unscored(self) -> int:
        """How many first positions of each sequence are left out of losses: those that predict a leading token.

        Position i predicts token i + 1. Nothing predicts the first token, so that a single BOS leaves every position scored.
        """
        return max(0, self.leading - 1)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Mapping[str, int],
    sequence_length: int,
    seed: int,
    bos: object = "auto",
) -> dict[str, TokenSet]:
    """Make the token sets of all parts.

    Each document goes, whole, to the part that is filled least relative to its need. Only where that leaves a
    part short are long documents of a split that feeds several parts cut into pieces, which are dealt likewise.
    So a text that is too short for all is shared in proportion to the needs. No text, whole or piece, is used
    twice.

    Args:
        source: where the documents come from.
        tokenizer: must have an end-of-sequence token.
        sequences: how many sequences each part needs, by part.
        sequence_length: tokens in a sequence, leading ones included.
        seed: determines the order of the documents.
        bos: which special tokens begin every sequence; see `leading_tokens`.

    Returns:
        A token set for each of `PARTS`, with `sequences[part]` sequences, or fewer (and a warning) if the
        text ends early.

    Raises:
        InputError: the text does not give every part at least one sequence, or a number asked for makes no
            sense.
    """
    leading = leading_tokens(tokenizer, bos)
    _check_request(sequences, sequence_length, len(leading))
    encode = _encoder(tokenizer)
    room = sequence_length - len(leading)  # for text in a sequence
    needs = {part: sequences[part] * room for part in PARTS}
    fillings = _fill(source, needs, encode, seed, cutting=False)
    if any(filling.share < 1 for filling in fillings.values()):
        fillings = _fill(source, needs, encode, seed, cutting=True)
    parts = {part: filling.pack(room, leading) for part, filling in fillings.items()}
    _check_length(parts, fillings, sequence_length, room, source)
    return parts


def split_record(parts: Mapping[str, TokenSet]) -> dict[str, dict[str, int | str]]:
    """What a run notes of its data, by part: documents, sequences, tokens, how many lead each sequence, fingerprint."""
    return {
        part: {
            "documents": tokens.documents,
            "sequences": tokens.ids.shape[0],
            "tokens": tokens.ids.numel(),
            "leading": tokens.leading,
            "fingerprint": tokens.fingerprint,
        }
        for part, tokens in parts.items()
    }


def cut(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
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


@dataclass
class _Filling:
    """A part while it is being filled."""

    need: int
    documents: int = 0
    tokens: int = 0
    chunks: list[torch.Tensor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """How much of the need is met, 1 or more when all of it is."""
        return self.tokens / self.need

    def add(self, ids: Sequence[int], separator: int) -> None:
        chunk = torch.tensor([separator, *ids] if self.chunks else ids, dtype=torch.int64)
        self.chunks.append(chunk)
        self.documents += 1
        self.tokens += len(chunk)

    def pack(self, room: int, leading: Sequence[int]) -> TokenSet:
        """The tokens as whole sequences, `room` of them behind the leading ones in each; what is left over is dropped."""
        tokens = torch.cat([torch.empty(0, dtype=torch.int64), *self.chunks])
        whole = min(self.tokens, self.need) // room
        first = torch.tensor(leading, dtype=torch.int64).expand(whole, -1)
        ids = torch.cat([first, tokens[: whole * room].view(whole, room)], dim=1)
        digest = xxhash.xxh3_128(ids.numpy().data)
        digest.update(str(tuple(ids.shape)).encode())
        if leading:
            digest.update(f"{len(leading)} leading".encode())
        return TokenSet(ids, self.documents, digest.hexdigest(), len(leading))


@dataclass(frozen=True)
class _Encoder:
    """Text to token ids without special tokens; `separator`, the end-of-sequence token, joins documents."""

    tokenizer: PreTrainedTokenizerBase
    separator: int

    def __call__(self, text: str) -> list[int]:
        # verbose=False: a document may well be longer than the model's context, as it is cut into sequences
        # afterwards.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    separator = tokenizer.eos_token_id
    if separator is None:
        raise InputError(
            "the model's tokenizer has no end-of-sequence token, which joins documents; set eos_token in its "
            "tokenizer_config.json"
        )
    return _Encoder(tokenizer, separator)


def _fill(source: TextSource, needs: Mapping[str, int], encode: _Encoder, seed: int, *, cutting: bool) -> dict[str, _Filling]:
    """Deal the source's documents to the parts; with `cutting`, long ones of a split that feeds several parts in pieces."""
    fillings = {part: _Filling(need=need) for part, need in needs.items()}
    generator = np.random.default_rng(seed)
    seen: set[int] = set()
    # Evaluation first: a text that two splits share is then missing from what the model is pruned with, and
    # figures on a published test set stay comparable with those of others.
    for split in dict.fromkeys(source.splits[part] for part in reversed(PARTS)):
        fed = [fillings[part] for part in PARTS if source.splits[part] == split]
        shared = cutting and len(fed) > 1
        _deal(_texts(source.documents(split, seed), shared=shared, seen=seen, generator=generator), fed, encode)
    return fillings


def _deal(texts: Iterable[str], fillings: Sequence[_Filling], encode: _Encoder) -> None:
    """Give each text to the part that is filled least relative to its need, until all are full."""
    for text in texts:
        ids = encode(text)
        if ids:
            min(fillings, key=lambda filling: filling.share).add(ids, encode.separator)
        if all(filling.share >= 1 for filling in fillings):
            return


def _texts(documents: Iterable[str], *, shared: bool, seen: set[int], generator: np.random.Generator) -> Iterator[str]:
    """The documents that are new, whole or (`shared`) the long ones as those of their pieces that are new."""
    for document in documents:
        if _is_new(document, seen):
            pieces = list(cut(document)) if shared else [document]
            if len(pieces) == 1:
                yield document
            else:
                # Shuffled, as a single long document would else be used from its start under every seed.
                yield from (piece for piece in shuffled(pieces, generator) if _is_new(piece, seen))


def _is_new(text: str, seen: set[int]) -> bool:
    """Whether a text is neither blank nor, by its hash, in `seen`, to which it is added."""
    key = xxhash.xxh3_128_intdigest(text.encode(errors="surrogatepass"))
    if not text.strip() or key in seen:
        return False
    seen.add(key)
    return True


def _check_request(sequences: Mapping[str, int], sequence_length: int, leading: int) -> None:
    least = max(1, leading) + 1
    if sequence_length < least:
        beside = f" beside the {leading} that the tokenizer puts first" if leading else ""
        raise InputError(
            f"data.sequence_length={sequence_length} leaves no token to predict{beside}; give {least} or more, such as 2048"
        )
    for part in PARTS:
        count = sequences.get(part)
        if not isinstance(count, int) or count < 1:
            raise InputError(f"data.sequences.{part}={count} is not a number of sequences; give 1 or more")


def _check_length(
    parts: Mapping[str, TokenSet], fillings: Mapping[str, _Filling], sequence_length: int, room: int, source: TextSource
) -> None:
    """Refuse a part without a sequence; warn, in one line, of parts with fewer than they need."""
    short = []
    for part, tokens in parts.items():
        have, need = tokens.ids.shape[0], fillings[part].need // room
        if have == 0:
            raise InputError(
                f"data.sequence_length={sequence_length} is more than the {fillings[part].tokens} tokens "
                f"that {source} has for {part}; give a smaller data.sequence_length, or more text"
            )
        if have < need:
            short.append(f"{part} {have} of {need}")
    if short:
        log.warning(
            "The text is too short for all sequences of %d tokens asked for, so there are fewer: %s",
            sequence_length,
            ", ".join(short),
        )
