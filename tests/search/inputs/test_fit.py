"""Sequences and ids that the model cannot take are refused before any work."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Mamba2Config, MistralConfig, OPTConfig, PreTrainedConfig

from search.inputs.data import TokenSet, check_ids, check_sequence_length, longest_sequence
from search.inputs.models import LoadedModel
from supernet.errors import InputError


def stretched(announced: int, **rope: Any) -> PreTrainedConfig:
    return LlamaConfig(max_position_embeddings=announced, rope_parameters={"rope_theta": 10_000.0, **rope})


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (GPT2Config(n_positions=128), 128),
        (OPTConfig(max_position_embeddings=128), 128),  # its embedding has two rows more, for an offset
        (LlamaConfig(max_position_embeddings=512), 512),
        (MistralConfig(max_position_embeddings=512, sliding_window=64), 512),
        (Mamba2Config(), None),
        (stretched(4096, rope_type="linear", factor=4.0), 16_384),
        (stretched(32_768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768), 131_072),
        (
            stretched(
                131_072,
                rope_type="llama3",
                factor=8.0,
                original_max_position_embeddings=8_192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
            131_072,
        ),
    ],
    ids=["gpt2", "opt", "llama", "mistral", "mamba2", "linear", "yarn", "llama3"],
)
def test_the_longest_sequence_of_a_config(config: PreTrainedConfig, longest: int | None) -> None:
    assert longest_sequence(config) == longest


def test_longer_sequences_are_refused_with_what_fits(tiny_llama: LoadedModel) -> None:
    model = tiny_llama.model
    longest = int(model.config.max_position_embeddings)
    check_sequence_length(model, longest)
    with pytest.raises(
        InputError, match=f"data.sequence_length={longest + 1} is more than the {longest} .* use .*={longest}"
    ):
        check_sequence_length(model, longest + 1)


def test_ids_beyond_the_embeddings_are_refused(tiny_llama: LoadedModel) -> None:
    rows = len(tiny_llama.model.get_input_embeddings().weight)
    check_ids(tiny_llama.model, {"search": TokenSet(torch.tensor([[0, rows - 1]]), 1, "")})
    with pytest.raises(InputError, match=f"token {rows} of the search text, but .* 0 to {rows - 1} only"):
        check_ids(tiny_llama.model, {"search": TokenSet(torch.tensor([[0, rows]]), 1, "")})
