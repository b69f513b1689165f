"""A family whose blocks differ, as hybrids and the first blocks of DeepSeek-V3 do, goes through everything here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.mamba.modeling_mamba import MambaMixer

from supernet.candidates import Dropped, Members, Weights
from supernet.models.architecture import sub_blocks
from supernet.models.families import FAMILIES, Family, Heads
from supernet.models.forward import check_walk, entry, final_norm_and_head
from supernet.models.placement import places
from supernet.models.prunables import bit_prunables, member_prunables, presence_prunables, weight_prunables
from supernet.space import ATTENTION, MIXER, MLP, Space, Unit

HIDDEN = 32


class AttentionOnly(nn.Module):
    """A block with attention alone, of fewer heads than the config says, by other names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        own = LlamaConfig(**(config.to_dict() | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}))
        own._attn_implementation = config._attn_implementation
        self.norm = LlamaRMSNorm(HIDDEN)
        self.attn = LlamaAttention(own, 1)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        context.pop("past_key_values", None)
        output: Tensor = self.attn(self.norm(x), **context)[0]
        return x + output


class MixerAndMlp(nn.Module):
    """A block with a state-space mixer instead of attention, and an MLP of one input layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer_norm, self.ff_norm = LlamaRMSNorm(HIDDEN), LlamaRMSNorm(HIDDEN)
        self.mixer = MambaMixer(MambaConfig(hidden_size=HIDDEN, state_size=4, num_hidden_layers=1), 0)
        self.feed_forward = nn.ModuleDict({"rise": nn.Linear(HIDDEN, 24), "fall": nn.Linear(24, HIDDEN)})
        self.feed_forward.forward = lambda x: self.feed_forward["fall"](torch.relu(self.feed_forward["rise"](x)))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        output: Tensor = x + self.feed_forward(self.ff_norm(x))
        return output


@dataclass(frozen=True)
class Differing(Family):
    """Block 1 has attention alone, block 2 a mixer and another MLP; the others are Llama's."""

    def of_block(self, config: PreTrainedConfig, index: int) -> Family:
        if index == 1:
            return replace(self, attention="attn", attention_norm="norm", mlp_rows=(), heads=Heads(1, 2, 8))
        if index == 2:
            return replace(
                self,
                attention="",
                mixer="mixer",
                mixer_norm="mixer_norm",
                mixer_stages=(("in_proj",), ("x_proj",), ("out_proj",)),
                mlp="feed_forward",
                mlp_norm="ff_norm",
                mlp_rows=("rise",),
                mlp_column="fall",
            )
        return self


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setitem(FAMILIES, "llama", Differing())
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=31,
        attn_implementation="eager",
    )
    made: Any = LlamaForCausalLM(config)
    made.model.layers[1], made.model.layers[2] = AttentionOnly(config), MixerAndMlp()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter.detach(), std=0.2, generator=generator)
    model: PreTrainedModel = made.eval().requires_grad_(False)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(1))


NAMES = (
    ("model.layers.0.self_attn", ATTENTION),
    ("model.layers.0.mlp", MLP),
    ("model.layers.1.attn", ATTENTION),
    ("model.layers.2.mixer", MIXER),
    ("model.layers.2.feed_forward", MLP),
    ("model.layers.3.self_attn", ATTENTION),
    ("model.layers.3.mlp", MLP),
)


def test_sub_blocks_are_those_of_each_block_and_compute_what_the_model_does(model: PreTrainedModel) -> None:
    assert tuple((part.name, part.kind) for part in sub_blocks(model)) == NAMES
    check_walk(model)


def test_contexts_have_the_names_of_each_block(model: PreTrainedModel, ids: Tensor) -> None:
    _, contexts = entry(model, ids)
    assert [set(context) >= {"position_embeddings", "attention_mask"} for context in contexts] == [True] * 4


class MaskFirst(nn.Module):
    def forward(self, x: Tensor, attention_mask: str, position_ids: str) -> Tensor:
        return x


class PositionsFirst(nn.Module):
    def forward(self, x: Tensor, position_ids: str, attention_mask: str) -> Tensor:
        return x


class WithoutNames(nn.Module):
    """A model that hands its blocks their arguments by position."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=2)
        self.model = nn.ModuleDict({"layers": nn.ModuleList([MaskFirst(), PositionsFirst()])})

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        first, second = self.get_submodule("model.layers").children()
        output: Tensor = second(first(input_ids, "mask", "positions"), "positions", "mask")
        return output


def test_arguments_without_names_get_those_of_their_own_block(ids: Tensor) -> None:
    made: Any = WithoutNames()
    _, contexts = entry(made, ids)
    assert contexts == [{"attention_mask": "mask", "position_ids": "positions"}] * 2


def test_prunables_have_the_sizes_of_their_block(model: PreTrainedModel) -> None:
    parts = sub_blocks(model)
    members = {one.name: (one.total, one.each) for one in member_prunables(parts, 1)}
    assert members == {
        "model.layers.0.self_attn": (2, (16 + 8 + 8) * 32 + 32 * 16),
        "model.layers.0.mlp": (48, 3 * 32),
        "model.layers.1.attn": (1, (16 + 8 + 8) * 32 + 32 * 16),
        "model.layers.2.feed_forward": (24, 32 + 1 + 32),
        "model.layers.3.self_attn": (2, (16 + 8 + 8) * 32 + 32 * 16),
        "model.layers.3.mlp": (48, 3 * 32),
    }
    queries = {one.name: one.total for one in member_prunables(parts, 1, query_heads=True) if one.kind == "heads"}
    assert queries == {"model.layers.0.self_attn": 4, "model.layers.1.attn": 2, "model.layers.3.self_attn": 4}
    layers = [name for name, _ in NAMES for _ in range({ATTENTION: 4, MLP: 3, MIXER: 3}[dict(NAMES)[name]])]
    layers.remove("model.layers.2.feed_forward")  # which has no gate
    assert [one.name.rpartition(".")[0] for one in weight_prunables(parts, ())] == layers
    assert len(bit_prunables(parts, (4,), 32)) == len(layers)
    assert len(presence_prunables(parts, whole_blocks=False)) == len(NAMES)
    assert len(presence_prunables(parts, whole_blocks=True)) == 4


@torch.no_grad()
def test_members_that_are_gone_count_for_nothing(model: PreTrainedModel, ids: Tensor) -> None:
    """Each unit without its last half: what the place computes is the model with zeros in these columns."""
    prunables = member_prunables(sub_blocks(model), 1)
    units = tuple(Unit(one.name, one.kind, one.total, (one.level(one.total), one.level(0))) for one in prunables)
    hidden, contexts = entry(model, ids)
    for place in places(model, Space(units)):
        part = place.part
        if part.groups is not None:
            assert [layer for _, layer in place.units] == [None]
            kept = torch.arange(part.groups.members - part.groups.members // 2)
            found = part(hidden, contexts[part.block], place.weights([Members(kept, None)]))
            zeroed = part.weight(part.column).clone()
            zeroed[:, len(kept) * part.groups.width :] = 0.0
            expected = part(hidden, contexts[part.block], part.replaced(part.column, zeroed))
            torch.testing.assert_close(found, expected)
            assert part.groups.members == 1 or not torch.allclose(found, part(hidden, contexts[part.block]))
        else:
            assert place.units == () and part.kind == MIXER
        hidden = part(hidden, contexts[part.block])
    normed, head = final_norm_and_head(model, hidden)
    torch.testing.assert_close(head.linear(normed), model(ids).logits)


@torch.no_grad()
def test_layers_and_blocks_are_placed_where_they_are(model: PreTrainedModel, ids: Tensor) -> None:
    parts = sub_blocks(model)
    layers = weight_prunables(parts, ())
    units = tuple(Unit(one.name, one.kind, one.total, (one.level(one.total), one.level(0))) for one in layers)
    for place in places(model, Space(units)):
        names = [units[unit].name for unit, _ in place.units]
        assert names == [f"{place.part.name}.{layer}" for stage in place.part.stages for layer in stage]
        shapes = [place.part.weight(layer or "").shape for _, layer in place.units]
        masks = [Weights(torch.zeros(shape, dtype=torch.bool), None) for shape in shapes]

        hidden, contexts = entry(model, ids)
        bias = place.part.bias(place.part.column)
        change = place.part.change(hidden, contexts[place.part.block], place.weights(masks))
        torch.testing.assert_close(change, torch.zeros_like(change) if bias is None else bias.expand_as(change))
    blocks = presence_prunables(parts, whole_blocks=True)
    whole = Space(tuple(Unit(one.name, one.kind, 1, one.choices or ()) for one in blocks))
    placed = [[unit for unit, _ in place.units] for place in places(model, whole)]
    assert placed == [[0], [0], [1], [2], [2], [3], [3]]
    assert places(model, whole)[0].weights([Dropped()]) is None


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_blocks_of_the_families_there_are_do_not_differ(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert all(family.of_block(PreTrainedConfig(), index) is family for index in (0, 1, 7))
