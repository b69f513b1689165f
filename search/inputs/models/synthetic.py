"""A small model with random weights for tests. The same seed gives the same weights."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from search.inputs.models.loaded import LoadedModel, made_ready
from supernet.errors import InputError

# It is a model for tests: larger ones are typing mistakes.
LARGEST = {
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
}


def random_llama(
    seed: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool = False,
    *,
    dtype: torch.dtype,
) -> LoadedModel:
    """Make a Llama with random weights and a tokenizer with one token for each byte.

    Args:
        seed: The same seed gives the same weights.
        hidden_size: As in transformers' `LlamaConfig`; so are the other sizes.
        intermediate_size: Neurons of each MLP.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: KV groups.
        tie_word_embeddings: Whether the head is the embedding.
        dtype: The dtype of the weights.

    Raises:
        InputError: A size is not a whole number in its range, or the heads do not fit the hidden size.
    """
    _check_arguments(locals())
    _check_heads(hidden_size, num_attention_heads, num_key_value_heads)
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=tie_word_embeddings,
        # Keeps the size of activations from layer to layer. The usual 0.02 makes small layers all but vanish
        # beside the residual stream, and what is pruned would hardly matter.
        initializer_range=hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws from the global generator; the fork puts it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Parameters only, as from_pretrained does: `model.to(dtype)` would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return made_ready(model, tokenizer, f"random-llama-{seed}")


def _check_arguments(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in LARGEST and (type(value) is not int or not 1 <= value <= LARGEST[name]):
            raise InputError(f"model.{name}={value} must be a whole number from 1 to {LARGEST[name]:,}")
    if type(given["seed"]) is not int or not 0 <= given["seed"] < 1 << 63:
        raise InputError(f"model.seed={given['seed']} must be a whole number from 0 on")
    if type(given["tie_word_embeddings"]) is not bool:
        raise InputError(f"model.tie_word_embeddings={given['tie_word_embeddings']} must be true or false")


def _check_heads(hidden: int, heads: int, groups: int) -> None:
    if hidden % heads or hidden // heads % 2:
        raise InputError(
            f"model.num_attention_heads={heads} must divide model.hidden_size={hidden} into heads of an even size"
        )
    if heads % groups:
        raise InputError(f"model.num_key_value_heads={groups} must divide model.num_attention_heads={heads}")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and an end-of-sequence token, 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters
    bytes_only = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>")
