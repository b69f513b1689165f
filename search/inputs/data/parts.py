"""Deals documents to the parts (calibration, search, evaluation), tokenises them, and packs them into sequences.

What a part consists of depends on nothing but the source, the tokenizer and the seed.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from search.inputs.data.encoder import Encoder, cut
from search.inputs.data.leading import leading_tokens
from search.inputs.data.shuffling import shuffled
from search.inputs.data.sources import PARTS, TextSource
from supernet.errors import InputError

# Documents that several parts share are cut to this length (about 2,000 tokens of English), so that one long
# document does not end up in one part only. Longer pieces keep more context within a sequence, shorter ones
# share more evenly.
PIECE_CHARACTERS = 8_192

ALL = math.inf

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one part.

    Attributes:
        ids: (sequences, sequence_length) int64. Each row has the leading tokens, then documents joined with the
            end-of-sequence token.
        documents: Number of documents, or pieces of cut ones, that the tokens come from.
        fingerprint: A hash of `ids` and `leading`.
        leading: Number of special tokens (BOS) that begin every sequence.
    """

    ids: torch.Tensor
    documents: int
    fingerprint: str
    leading: int = 0

    @property
    def unscored(self) -> int:
        """Number of first positions of each sequence that losses leave out, as they predict a leading token.

        Position i predicts token i + 1. Nothing predicts the first token, so that a single BOS leaves every position
        scored.
        """
        return max(0, self.leading - 1)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Mapping[str, int | str],
    sequence_length: int,
    seed: int,
    bos: object = "auto",
    seen: set[int] | None = None,
) -> dict[str, TokenSet]:
    """Make the token sets of all parts.

    Each document goes, whole, to the part that is filled least relative to its need. If that leaves a part short,
    long documents of a split that feeds several parts are cut into pieces, which are dealt in the same way. So a text
    that is too short for all is shared in proportion to the needs. No text, whole or in pieces, is used twice.

    Args:
        source: Where the documents come from.
        tokenizer: The model's tokenizer, with an end-of-sequence token.
        sequences: Number of sequences that each part needs; "all" takes what the evaluation's split gives.
        sequence_length: Tokens in a sequence, leading ones included.
        seed: Determines the order of the documents.
        bos: Which special tokens begin every sequence, as `leading_tokens` takes it.
        seen: Takes up hashes of all texts that were read, for `held_out`.

    Returns:
        A token set for each of `PARTS`, with `sequences[part]` sequences, or fewer (and a warning) if the
        text ends early.

    Raises:
        InputError: The text does not give every part at least one sequence, or a number makes no sense.
    """
    leading = leading_tokens(tokenizer, bos)
    _check_request(sequences, sequence_length, len(leading))
    encode = Encoder.of(tokenizer, leading)
    room = sequence_length - len(leading)  # for text in a sequence
    needs: dict[str, float] = {part: ALL if sequences[part] == "all" else int(sequences[part]) * room for part in PARTS}
    _check_all(needs, source)
    seen = set() if seen is None else seen
    fillings = _fill(source, needs, encode, seed, seen, cutting=False)
    if any(filling.need < ALL and filling.share < 1 for filling in fillings.values()):
        seen.clear()
        fillings = _fill(source, needs, encode, seed, seen, cutting=True)
    parts = {part: filling.pack(room, leading) for part, filling in fillings.items()}
    _check_length(parts, fillings, sequence_length, room, source)
    return parts


def held_out(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int | str,
    sequence_length: int,
    seed: int,
    bos: object = "auto",
    seen: Iterable[int] = (),
) -> TokenSet:
    """Make the token set of a further text that models are measured on, beside a run's own.

    Args:
        source: Where its documents come from; the split for the evaluation counts.
        tokenizer: The model's tokenizer, with an end-of-sequence token.
        sequences: Number of sequences, at most, or "all" that the split gives.
        sequence_length: Tokens in a sequence, leading ones included.
        seed: Determines the order of the documents.
        bos: Which special tokens begin every sequence, as `leading_tokens` takes it.
        seen: Hashes from `prepare`: texts that a run was calibrated or searched on are left out.

    Raises:
        InputError: The text cannot be had, or gives not a single sequence.
    """
    leading = leading_tokens(tokenizer, bos)
    encode, room = Encoder.of(tokenizer, leading), sequence_length - len(leading)
    filling, split = _Filling(ALL if sequences == "all" else int(sequences) * room), source.splits["evaluation"]
    # What others measure on as a whole (a test set) stays whole, and in its order.
    shared = list(source.splits.values()).count(split) > 1
    texts = map(encode.text_of, source.documents(split, seed))
    _deal(_texts(texts, shared=shared, seen=set(seen), generator=np.random.default_rng(seed)), [filling], encode)
    found = filling.pack(room, leading)
    if not len(found.ids):
        raise InputError(
            f"{source} has {filling.tokens} tokens that the run is not calibrated on, and a sequence takes "
            f"{sequence_length}"
        )
    return found


def split_record(parts: Mapping[str, TokenSet]) -> dict[str, dict[str, int | str]]:
    """Return what a run notes of its data, by part: documents, sequences, tokens, leading tokens and fingerprint."""
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


@dataclass
class _Filling:
    """A part while documents are dealt to it."""

    need: float  # tokens; `ALL` for all there are
    documents: int = 0
    tokens: int = 0
    chunks: list[torch.Tensor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the need that is met; 1 or more if all of it is."""
        return self.tokens / self.need

    def add(self, ids: Sequence[int], separator: int) -> None:
        chunk = torch.tensor([separator, *ids] if self.chunks else ids, dtype=torch.int64)
        self.chunks.append(chunk)
        self.documents += 1
        self.tokens += len(chunk)

    def pack(self, room: int, leading: Sequence[int]) -> TokenSet:
        """Return the tokens as whole sequences, `room` tokens behind the leading ones; drop what is left over."""
        tokens = torch.cat([torch.empty(0, dtype=torch.int64), *self.chunks])
        whole = int(min(self.tokens, self.need)) // room
        first = torch.tensor(leading, dtype=torch.int64).expand(whole, -1)
        ids = torch.cat([first, tokens[: whole * room].view(whole, room)], dim=1)
        digest = xxhash.xxh3_128(ids.numpy().data)
        digest.update(str(tuple(ids.shape)).encode())
        if leading:
            digest.update(f"{len(leading)} leading".encode())
        return TokenSet(ids, self.documents, digest.hexdigest(), len(leading))


def _fill(
    source: TextSource, needs: Mapping[str, float], encode: Encoder, seed: int, seen: set[int], *, cutting: bool
) -> dict[str, _Filling]:
    """Deal the source's documents to the parts; with `cutting`, shared splits give long documents in pieces."""
    fillings = {part: _Filling(need=need) for part, need in needs.items()}
    generator = np.random.default_rng(seed)
    # Evaluation first: a text that two splits share is then missing from what the model is pruned with, and
    # figures on a published test set stay comparable with those of others.
    for split in dict.fromkeys(source.splits[part] for part in reversed(PARTS)):
        fed = [fillings[part] for part in PARTS if source.splits[part] == split]
        shared = cutting and len(fed) > 1
        texts = map(encode.text_of, source.documents(split, seed))
        _deal(_texts(texts, shared=shared, seen=seen, generator=generator), fed, encode)
    return fillings


def _deal(texts: Iterable[str], fillings: Sequence[_Filling], encode: Encoder) -> None:
    """Give each text to the part that is filled least relative to its need, until all are full."""
    for text in texts:
        neediest = min(fillings, key=lambda filling: filling.share)
        ids = encode(text, neediest.need - neediest.tokens)
        if ids:
            neediest.add(ids, encode.separator)
        if all(filling.share >= 1 for filling in fillings):
            return


def _texts(documents: Iterable[str], *, shared: bool, seen: set[int], generator: np.random.Generator) -> Iterator[str]:
    """Yield the documents that are new; with `shared`, long documents as pieces, of which those that are new."""
    for document in documents:
        if _is_new(document, seen):
            pieces = list(cut(document, PIECE_CHARACTERS)) if shared else [document]
            if len(pieces) == 1:
                yield document
            else:
                # Shuffled, as a single long document would else be used from its start under every seed.
                yield from (piece for piece in shuffled(pieces, generator) if _is_new(piece, seen))


def _is_new(text: str, seen: set[int]) -> bool:
    """Return whether a text is not blank and not in `seen`, which holds hashes, and add it there."""
    if not text or text.isspace():
        return False
    key = xxhash.xxh3_128_intdigest(text.encode(errors="surrogatepass"))
    if key in seen:
        return False
    seen.add(key)
    return True


def _check_request(sequences: Mapping[str, int | str], sequence_length: int, leading: int) -> None:
    least = max(1, leading) + 1
    if sequence_length < least:
        beside = f" beside the {leading} that the tokenizer puts first" if leading else ""
        raise InputError(
            f"data.sequence_length={sequence_length} leaves no token to predict{beside}; give {least} or more, such as "
            "2048"
        )
    for part in PARTS:
        count = sequences.get(part)
        if count == "all":
            continue
        if not isinstance(count, int) or count < 1:
            raise InputError(f"data.sequences.{part}={count} is not a number of sequences; give 1 or more")


def _check_all(needs: Mapping[str, float], source: TextSource) -> None:
    """Refuse "all" where it makes no sense: for parts that the model is pruned with, and for a shared split."""
    for part, need in needs.items():
        if need == ALL and part != "evaluation":
            raise InputError(
                f"data.sequences.{part}=all is only for the evaluation; give a number of sequences, such as 128"
            )
    others = {source.splits[part] for part in PARTS if part != "evaluation"}
    if needs["evaluation"] == ALL and source.splits["evaluation"] in others:
        raise InputError(
            "data.sequences.evaluation=all needs a text of its own; give a number of sequences, or such a text: "
            "data.source.evaluation_path=FILE (data=local), data.source.splits.evaluation=test (data sets of the hub)"
        )


def _check_length(
    parts: Mapping[str, TokenSet], fillings: Mapping[str, _Filling], sequence_length: int, room: int, source: TextSource
) -> None:
    """Refuse a part without a sequence, and warn in one line of parts with fewer than they need."""
    short = []
    for part, tokens in parts.items():
        have, need = tokens.ids.shape[0], fillings[part].need / room
        if have == 0:
            raise InputError(
                f"data.sequence_length={sequence_length} is more than the {fillings[part].tokens} tokens that {source} "
                f"has for {part} (what repeats counts once); give a smaller data.sequence_length, or more text"
            )
        if need < ALL and have < need:
            short.append(f"{part} {have} of {need:.0f}")
    if short:
        log.warning(
            "The text is too short for all sequences of %d tokens asked for, so there are fewer: %s",
            sequence_length,
            ", ".join(short),
        )
