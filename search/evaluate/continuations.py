"""Lets a model go on with a few words, which shows at a glance what numbers do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 32  # how many a model writes: enough for a sentence


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, leading: Sequence[int] = ()
) -> str:
    """Return what the model writes behind the prompt, taking the most probable token each time (greedy decoding).

    Args:
        model: A causal language model that can generate.
        tokenizer: The model's tokenizer.
        prompt: The text to go on with, which is taken as it is, without a chat template.
        leading: Ids of the special tokens that begin every sequence of the run, such as BOS.

    Returns:
        Up to `TOKENS` new tokens as text, without special tokens.
    """
    ids = [*leading, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    given = torch.tensor([ids], device=model.device)
    # A configuration of its own: the checkpoint's may sample, which would differ from run to run.
    greedy = GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    generate: Any = model.generate  # transformers declares it as what a module may hold
    found = generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))
