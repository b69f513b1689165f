"""Continuations are the greedy ones, whatever the checkpoint's own way of generating is."""

import pytest
import torch
from transformers import PreTrainedModel

from search.evaluate.continuations import TOKENS, continuation
from search.inputs.models import LoadedModel, random_llama


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return random_llama(
        seed=0, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        dtype=torch.float32,
    )  # fmt: skip


def greedy(model: PreTrainedModel, ids: list[int], stop: int | None) -> list[int]:
    """One token at a time from whole forward passes, without a cache."""
    found: list[int] = []
    while len(found) < TOKENS:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        found.append(token)
        if token == stop:
            break
    return found


@pytest.mark.parametrize("leading", [(), (5,)])
def test_it_is_the_most_probable_token_each_time(tiny: LoadedModel, leading: tuple[int, ...]) -> None:
    model, tokenizer = tiny.model, tiny.tokenizer
    model.generation_config.do_sample = True
    ids = [*leading, *tokenizer("to be or", add_special_tokens=False)["input_ids"]]
    expected = tokenizer.decode(greedy(model, ids, tokenizer.eos_token_id), skip_special_tokens=True)
    assert continuation(model, tokenizer, "to be or", leading) == expected
    assert continuation(model, tokenizer, "to be or", leading) == expected


@pytest.mark.slow
def test_a_real_model_knows_its_capitals(smollm2: LoadedModel) -> None:
    assert "Paris" in continuation(smollm2.model, smollm2.tokenizer, "The capital of France is")
