"""What can be pruned of a model, at which levels, and what each costs; what cannot is told in one line."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from supernet.errors import InputError
from supernet.models.architecture import SubBlock, parameter_count, sub_blocks
from supernet.models.prunables import (
    Pattern,
    Prunable,
    bit_prunables,
    group_size,
    member_prunables,
    presence_prunables,
    weight_prunables,
)
from supernet.space import ATTENTION, BITS, BLOCK, HEADS, MIXER, MLP, WEIGHTS, Level

ModelOf = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def llama(model_of: ModelOf) -> tuple[SubBlock, ...]:
    """Three blocks of 4 KV groups of 2 heads of 8 channels, and 96 neurons; 64 hidden."""
    return sub_blocks(model_of("llama"))


def by_name(prunables: Sequence[Prunable]) -> dict[str, Prunable]:
    return {one.name: one for one in prunables}


def linear_layers(parts: Sequence[SubBlock]) -> list[str]:
    return [f"{part.name}.{layer}" for part in parts for stage in part.stages for layer in stage]


def test_members(llama: tuple[SubBlock, ...]) -> None:
    found = member_prunables(llama, 32)
    assert [one.name for one in found] == [part.name for part in llama]
    assert set(found[::2]) == {Prunable(part.name, ATTENTION, 4, 64 * (16 + 8 + 8 + 16)) for part in llama[::2]}
    assert set(found[1::2]) == {Prunable(part.name, MLP, 96, 3 * 64, 32) for part in llama[1::2]}


def test_query_heads_cost_their_rows_of_the_queries_and_their_columns_of_the_output(
    llama: tuple[SubBlock, ...],
) -> None:
    found = member_prunables(llama, 32, query_heads=True)
    assert set(found[::2]) == {Prunable(part.name, HEADS, 8, 64 * (8 + 8)) for part in llama[::2]}
    assert found[1::2] == member_prunables(llama, 32)[1::2]  # neurons are the same


def test_all_members_cost_all_that_is_counted_but_output_biases(family_model: PreTrainedModel) -> None:
    """Biases behind the last layer, and norms, go with no member."""
    for part, one in zip(sub_blocks(family_model), member_prunables(sub_blocks(family_model), 1), strict=True):
        output_bias = part.bias(part.column)
        assert one.total * one.each == part.parameters - (0 if output_bias is None else len(output_bias))
        assert one.total * one.each <= parameter_count(part.module)


def test_every_linear_layer_can_lose_single_weights(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    found = weight_prunables(parts, ())
    assert [one.name for one in found] == linear_layers(parts)
    shapes = [part.weight(layer).shape for part in parts for stage in part.stages for layer in stage]
    assert [(one.kind, one.total, one.each, one.multiple, one.choices) for one in found] == [
        (WEIGHTS, d_out * d_in, 1, d_out, None) for d_out, d_in in shapes
    ]


def test_weights_go_in_whole_rows_worth(llama: tuple[SubBlock, ...]) -> None:
    found = by_name(weight_prunables(llama, ()))
    key, down = found["model.layers.1.self_attn.k_proj"], found["model.layers.1.mlp.down_proj"]
    assert (key.total, key.multiple) == (32 * 64, 32)
    assert (down.total, down.multiple) == (64 * 96, 64)


def test_patterns_are_levels_whatever_their_order(llama: tuple[SubBlock, ...]) -> None:
    for texts in (("2:4", "3:4", "1:8"), ("1:8", "2:4", "3:4")):
        found = by_name(weight_prunables(llama, [Pattern.parse(text) for text in texts]))
        total = 32 * 64
        counts = (total, total * 3 // 4, total // 2, total // 8)
        assert found["model.layers.0.self_attn.k_proj"].choices == tuple(Level(count, count) for count in counts)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("name", "dense"), [("llama", 32), ("mamba", 32), ("gpt2", 32)])
def test_bits_cost_codes_scales_and_zeros(model_of: ModelOf, name: str, dense: int, symmetric: bool) -> None:
    parts, zero = sub_blocks(model_of(name)), 0 if symmetric else 8
    found = by_name(bit_prunables(parts, (3, 8, 4, 4), 24, symmetric))
    assert list(found) == linear_layers(parts)
    for part in parts:
        for layer in (layer for stage in part.stages for layer in stage):
            d_out, d_in = part.weight(layer).shape
            groups = d_in // group_size(d_in, 24)
            expected = [Level(dense, dense * d_out * d_in)]
            expected += [Level(bits, d_out * (bits * d_in + groups * (dense + zero))) for bits in (8, 4, 3)]
            one = found[f"{part.name}.{layer}"]
            assert (one.kind, one.total, one.choices) == (BITS, dense, tuple(expected))


def test_the_dense_width_is_that_of_the_weights(model_of: ModelOf) -> None:
    model = model_of("llama").bfloat16()
    (level, _) = bit_prunables(sub_blocks(model), (4,), 64)[0].choices or ()
    assert level == Level(16, 16 * 64 * 64)


@pytest.mark.parametrize(
    ("d_in", "group", "size"), [(4096, 128, 128), (64, 128, 64), (96, 64, 48), (7, 128, 7), (7, 6, 1), (10, 1, 1)]
)
def test_groups_divide_the_inputs(d_in: int, group: int, size: int) -> None:
    assert group_size(d_in, group) == size


def test_presence_of_sub_blocks(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    found = presence_prunables(parts, whole_blocks=False)
    assert [(one.name, one.kind) for one in found] == [(part.name, part.kind) for part in parts]
    assert all(one.choices == (Level(1, part.parameters), Level(0, 0)) for one, part in zip(found, parts, strict=True))
    assert all(one.total == 1 for one in found)


def test_presence_of_whole_blocks(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    found = presence_prunables(parts, whole_blocks=True)
    assert [(one.name, one.kind) for one in found] == [
        (name, BLOCK) for name in dict.fromkeys(p.block_name for p in parts)
    ]
    for one in found:
        cost = sum(part.parameters for part in parts if part.block_name == one.name)
        assert one.choices == (Level(1, cost), Level(0, 0))


@pytest.mark.parametrize("text", ["2:4", "1:2", "63:64", "1:64"])
def test_patterns_are_read(text: str) -> None:
    pattern = Pattern.parse(text)
    assert f"{pattern.keep}:{pattern.of}" == text
    assert pattern.kept(64 * 5) == 64 * 5 * pattern.keep // pattern.of


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "2",
        "2:",
        ":4",
        "2:2",
        "4:2",
        "0:4",
        "-1:4",
        "2:-4",
        "2:65",
        "a:b",
        "2:4:8",
        "2.0:4",
        "2/4",
        "half",
        "²:4",
    ],
)
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"^prune\.pruner\.pattern=.* is not N:M with 0 < N < M <= 64; 2:4 keeps two of every four"
    ):
        Pattern.parse(text)


def test_a_pattern_must_divide_the_inputs(model_of: ModelOf) -> None:
    parts = sub_blocks(model_of("llama", intermediate_size=6))
    with pytest.raises(
        InputError, match=r"^prune\.pruner\.pattern=2:4 does not divide the 6 inputs of model\.layers\.0\.mlp\.down_"
    ):
        weight_prunables(parts, [Pattern(2, 4)])
    assert len(weight_prunables(parts, [Pattern(1, 2)])) == 21


@pytest.mark.parametrize("bits", [(), (1,), (9,), (4, 16), (0,), (-2,)])
def test_impossible_widths_are_refused(llama: tuple[SubBlock, ...], bits: Sequence[int]) -> None:
    with pytest.raises(
        InputError, match=r"^prune\.pruner\.bits=\[.*\] must be a list of widths from 2 to 8, such as \[8,6,4,3,2\]$"
    ):
        bit_prunables(llama, bits, 128)


@pytest.mark.parametrize("group", [0, -1])
def test_impossible_groups_are_refused(llama: tuple[SubBlock, ...], group: int) -> None:
    with pytest.raises(
        InputError, match=f"^prune.pruner.group={group} must be at least 1 input; 128 is the usual choice$"
    ):
        bit_prunables(llama, (4,), group)


@pytest.mark.parametrize("group", [1, 2])
def test_groups_whose_scales_take_what_codes_save_are_refused(model_of: ModelOf, group: int) -> None:
    """In bfloat16 8 bits save 8 a weight, and a scale and a zero take 24: 12 a weight in groups of two."""
    parts = sub_blocks(model_of("llama").bfloat16())
    taken = f"one for {group} of its 64 inputs, take as much as 8 bits save"
    with pytest.raises(
        InputError, match=rf"^prune\.pruner\.group={group}: .* {taken}; use a larger group that divides 64, or"
    ):
        bit_prunables(parts, (8, 4), group)
    assert len(bit_prunables(parts, (8, 4), 4)) == 21


def test_a_larger_group_is_not_asked_for_where_there_is_none() -> None:
    part = SimpleNamespace(name="mlp", stages=(("up",),), weight=lambda layer: torch.zeros(4, 1, dtype=torch.bfloat16))
    with pytest.raises(
        InputError, match=r"^prune\.pruner\.group=128: .* one for 1 of its 1 inputs, .* bits save; leave out that"
    ):
        bit_prunables([part], (8,), 128)  # type: ignore[list-item]


@pytest.mark.parametrize("multiple", [0, -32, 97])
def test_an_impossible_multiple_is_refused(llama: tuple[SubBlock, ...], multiple: int) -> None:
    with pytest.raises(
        InputError, match=f"^prune.multiple={multiple} must lie between 1 and the 96 neurons of an MLP; 32 suits"
    ):
        member_prunables(llama, multiple)


@pytest.mark.parametrize("multiple", [1, 32, 96])
def test_multiples_up_to_the_number_of_neurons_are_accepted(llama: tuple[SubBlock, ...], multiple: int) -> None:
    assert {one.multiple for one in member_prunables(llama, multiple) if one.kind == MLP} == {multiple}
    assert {one.multiple for one in member_prunables(llama, multiple) if one.kind == ATTENTION} == {1}


@pytest.mark.parametrize("query_heads", [False, True])
def test_a_model_without_members_is_refused(mixer_model: PreTrainedModel, query_heads: bool) -> None:
    parts = sub_blocks(mixer_model)
    assert {part.kind for part in parts} == {MIXER}
    with pytest.raises(
        InputError, match="neither attention nor MLPs to take heads or neurons from; prune its weights or blocks$"
    ):
        member_prunables(parts, 1, query_heads)


def test_a_bias_that_candidates_bring_is_paid_for(model_of: ModelOf) -> None:
    without, own = (sub_blocks(model_of(name)) for name in ("llama", "llama_with_biases"))
    for part, one in zip(without, member_prunables(without, 1, bias=True), strict=True):
        assert one.added == len(part.weight(part.column))
        assert [one.level(kept).cost for kept in (one.total, 1, 0)] == [one.total * one.each, one.each + one.added, 0]
    assert all(one.added == 0 for one in member_prunables(own, 1, bias=True))  # takes the place of the one there is
    assert all(one.added == 0 for one in member_prunables(without, 1))
