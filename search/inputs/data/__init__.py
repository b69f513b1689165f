"""From text to token sequences: the calibration, the search and the evaluation part, which never share a
text.

A text source (`sources.py`) yields documents, texts or chats, out of `files.py` or elsewhere; `prepare` (`parts.py`)
deals them to the parts, tokenises them (`encoder.py`) and packs the tokens into sequences of equal length, without
padding, which begin as the tokenizer begins a text (`leading.py`). `fit.py` compares them with what the model can take.
"""

from search.inputs.data.fit import check_ids, check_sequence_length, longest_sequence
from search.inputs.data.leading import leading_tokens
from search.inputs.data.parts import TokenSet, prepare, split_record
from search.inputs.data.sources import PARTS, HubText, LocalText, PydocTopics, TextSource

__all__ = [
    "PARTS",
    "HubText",
    "LocalText",
    "PydocTopics",
    "TextSource",
    "TokenSet",
    "check_ids",
    "check_sequence_length",
    "leading_tokens",
    "longest_sequence",
    "prepare",
    "split_record",
]
