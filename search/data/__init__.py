"""From text to token sequences: the calibration, the search and the evaluation part, which never share a
text.

A text source (`sources.py`) yields documents; `prepare` (`parts.py`) deals them to the parts, tokenises them
and packs the tokens into sequences of equal length, without padding.
"""

from search.data.leading import leading_tokens
from search.data.parts import TokenSet, prepare, split_record
from search.data.sources import PARTS, HubText, LocalText, PydocTopics, TextSource

__all__ = [
    "PARTS",
    "HubText",
    "LocalText",
    "PydocTopics",
    "TextSource",
    "TokenSet",
    "leading_tokens",
    "prepare",
    "split_record",
]
