"""Turns text into token sequences for three parts that never share a text: calibration, search and evaluation.

A text source (`sources.py`, `packaged.py`, `generated.py`) yields documents, texts or chats, out of `files.py` or
elsewhere; `prepare` (`parts.py`) deals them to the parts, tokenises them (`encoder.py`) and packs the tokens into
sequences of equal length, without padding, which begin as the tokenizer begins a text (`leading.py`). `fit.py` compares
them with what the model can take.
"""

from search.inputs.data.fit import check_ids, check_sequence_length, longest_sequence
from search.inputs.data.generated import GeneratedText
from search.inputs.data.leading import leading_tokens
from search.inputs.data.mixed import MixedText
from search.inputs.data.named import check_name, evaluation_sequences, source_named
from search.inputs.data.packaged import PackagedText
from search.inputs.data.parts import TokenSet, held_out, prepare, split_record
from search.inputs.data.sources import PARTS, HubText, LocalText, PydocTopics, TextSource

__all__ = [
    "PARTS",
    "GeneratedText",
    "HubText",
    "LocalText",
    "MixedText",
    "PackagedText",
    "PydocTopics",
    "TextSource",
    "TokenSet",
    "check_ids",
    "check_name",
    "check_sequence_length",
    "evaluation_sequences",
    "held_out",
    "leading_tokens",
    "longest_sequence",
    "prepare",
    "source_named",
    "split_record",
]
