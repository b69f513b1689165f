"""ShortGPT: similarities of the residual stream, and what is dropped by them."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.strategies.rules.shortgpt import ShortGPT, drop_lowest, similarities
from tests.search.rules import ModelOf, dense_of, problem_of, run, space_of_kind
from tests.search.synthetic import SpaceOf


class TestSimilarities:
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_of_blocks_and_sub_blocks(self, llama: PreTrainedModel, ids: Tensor, batch: int) -> None:
        found = similarities(dense_of(llama, ids, batch))
        streams: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, x, y: streams.extend((x[0], y if torch.is_tensor(y) else y[0])))
            for layer in llama.model.layers
        ]
        middles: list[Tensor] = []
        handles += [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: middles.append(x[0]))
            for layer in llama.model.layers
        ]
        with torch.no_grad():
            llama(input_ids=ids)
        for handle in handles:
            handle.remove()

        def mean(a: Tensor, b: Tensor) -> float:
            a, b = a.double(), b.double()
            return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())

        for index in range(3):
            before, middle, behind = streams[2 * index], middles[index], streams[2 * index + 1]
            assert found.blocks[index] == pytest.approx(mean(before, behind), abs=1e-5)
            assert found.parts[f"model.layers.{index}.self_attn"] == pytest.approx(mean(before, middle), abs=1e-5)
            assert found.parts[f"model.layers.{index}.mlp"] == pytest.approx(mean(middle, behind), abs=1e-5)

    def test_an_absent_sub_block_changes_nothing(self, llama: PreTrainedModel, ids: Tensor) -> None:
        found = similarities(dense_of(llama, ids), replaced=lambda part: None if part.block == 1 else {})
        assert found.blocks[1] == pytest.approx(1.0)
        assert found.blocks[0] == similarities(dense_of(llama, ids)).blocks[0]


class TestShortGPT:
    def test_the_lowest_are_dropped(self, space_of: SpaceOf) -> None:
        problem = problem_of(space_of(*[(10, (1, 0))] * 4), 0.5)
        assert drop_lowest(np.array([0.3, 0.1, 0.4, 0.2]), problem) == (0, 1, 0, 1)

    def test_a_block_that_does_nothing_goes(self, model_of: ModelOf, ids: Tensor) -> None:
        model = model_of("llama")
        for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            layer.weight.mul_(1e-4)
        for kind, expected in (("blocks", (0, 1, 0)), ("sub-blocks", (0, 0, 1, 1, 0, 0))):
            state, _ = run(ShortGPT(), problem_of(space_of_kind(model, kind), 0.33, dense_of(model, ids)))
            assert state.parent == expected
