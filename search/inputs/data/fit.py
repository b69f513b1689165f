"""Checks whether text suits a model: sequences no longer than its positions, ids no larger than its vocabulary.

This is checked before any work begins. Beyond its positions, a model with learned position embeddings fails in the
middle of a pass; one with rotary embeddings goes on, and what is measured is a state that it was never trained for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from search.inputs.data.parts import TokenSet
from supernet.errors import InputError


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model knows positions for; None if it has no such limit, as Mamba.

    Sliding windows are no limit. If rotary positions are stretched by a factor, their first length times the factor
    counts where it is more than what the config announces.
    """
    announced = getattr(config, "max_position_embeddings", None)
    if type(announced) is not int or announced < 1:
        return None
    return max([announced, *_stretched(config, announced)])


def _stretched(config: PreTrainedConfig, announced: int) -> Iterator[int]:
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(ropes, Mapping):
        return
    of_layers = [
        rope for rope in ropes.values() if isinstance(rope, Mapping)
    ]  # one for each type of layer, or one for all
    for rope in of_layers or [ropes]:
        factor: Any = rope.get("factor")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" and isinstance(factor, int | float) and factor > 1:
            yield int(factor * (rope.get("original_max_position_embeddings") or announced))


def check_sequence_length(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise InputError if sequences are longer than the model's positions."""
    longest = longest_sequence(model.config)
    if longest is not None and sequence_length > longest:
        raise InputError(
            f"data.sequence_length={sequence_length} is more than the {longest} tokens that the model knows positions "
            f"for; use data.sequence_length={longest} or less"
        )


def check_ids(model: PreTrainedModel, parts: Mapping[str, TokenSet]) -> None:
    """Raise InputError if a token has no row in the model's embeddings."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    for part, tokens in parts.items():
        largest = int(tokens.ids.max())
        if largest >= rows:
            raise InputError(
                f"the tokenizer makes token {largest} of the {part} text, but the model has embeddings for 0 to "
                f"{rows - 1} only; give the model's own tokenizer"
            )
