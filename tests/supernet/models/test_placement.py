"""Units of every kind find their sub-blocks, and their candidates the parameters that they stand for."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, member_columns
from supernet.models.architecture import SubBlock, by_query_heads, sub_blocks
from supernet.models.forward import entry
from supernet.models.placement import Place, full_weight, is_absent, parameters, places, sliced
from supernet.models.prunables import (
    Prunable,
    bit_prunables,
    member_prunables,
    presence_prunables,
    weight_prunables,
)
from supernet.space import ATTENTION, Level, Space, Unit
from supernet.store import Supernet

WithZeros = Callable[[PreTrainedModel, Supernet, Sequence[int]], PreTrainedModel]
SupernetOf = Callable[[PreTrainedModel, str], Supernet]
ModelOf = Callable[..., PreTrainedModel]


def space_of(prunables: Sequence[Prunable]) -> Space:
    return Space(
        tuple(Unit(p.name, p.kind, p.total, p.choices or (Level(p.total, p.total * p.each),)) for p in prunables)
    )


def names(space: Space, place: Place) -> list[tuple[str, str | None]]:
    return [(space.units[index].name, layer) for index, layer in place.units]


# Places


@pytest.mark.parametrize("query_heads", [False, True])
def test_members_act_on_a_sub_block_as_a_whole(family_model: PreTrainedModel, query_heads: bool) -> None:
    parts = sub_blocks(family_model)
    space = space_of(member_prunables(parts, 1, query_heads))
    found = places(family_model, space)
    assert [names(space, place) for place in found] == [[(part.name, None)] for part in parts]
    expected = by_query_heads(parts) if query_heads else parts
    assert [place.part.groups for place in found] == [part.groups for part in expected]
    assert [place.part.kind for place in found] == [part.kind for part in parts]


@pytest.mark.parametrize("kind", ["weights", "bits"])
def test_linear_layers_act_on_the_sub_block_they_are_in(any_model: PreTrainedModel, kind: str) -> None:
    parts = sub_blocks(any_model)
    space = space_of(weight_prunables(parts, ()) if kind == "weights" else bit_prunables(parts, (4,), 16))
    found = places(any_model, space)
    layers = [[layer for stage in part.stages for layer in stage] for part in parts]
    expected = [[(f"{part.name}.{n}", n) for n in mine] for part, mine in zip(parts, layers, strict=True)]
    assert [names(space, place) for place in found] == expected
    assert sorted(index for place in found for index, _ in place.units) == list(range(len(space.units)))  # each once


def test_sub_blocks_and_blocks_are_present_or_not(any_model: PreTrainedModel) -> None:
    parts = sub_blocks(any_model)
    for whole_blocks in (False, True):
        space = space_of(presence_prunables(parts, whole_blocks))
        found = [names(space, place) for place in places(any_model, space)]
        assert found == [[(part.block_name if whole_blocks else part.name, None)] for part in parts]


def test_the_order_of_units_in_the_space_does_not_matter(model_of: ModelOf) -> None:
    model = model_of("llama")
    space = space_of(weight_prunables(sub_blocks(model), ()))
    backwards = Space(space.units[::-1])
    assert [names(backwards, p) for p in places(model, backwards)] == [names(space, p) for p in places(model, space)]


def test_sub_blocks_without_units_have_a_place_too(model_of: ModelOf) -> None:
    model = model_of("llama")
    space = Space(space_of(member_prunables(sub_blocks(model), 1)).units[3:4])
    found = places(model, space)
    assert [len(place.units) for place in found] == [0, 0, 0, 1, 0, 0]
    assert found[0].weights([]) == {}


# Weights


def a_place(model: PreTrainedModel, prunables: Sequence[Prunable], index: int = 0) -> Place:
    return places(model, space_of(prunables))[index]


def test_layers_at_different_levels_are_merged(model_of: ModelOf) -> None:
    """Queries at one level, keys dense, values at a third, the output with new values; neurons' layers on grids."""
    model, generator = model_of("llama"), torch.Generator().manual_seed(0)
    place = a_place(model, weight_prunables(sub_blocks(model), ()))
    assert [layer for _, layer in place.units] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    masks = [
        torch.rand(place.part.weight(n).shape, generator=generator) < share
        for n, share in (("q_proj", 0.7), ("v_proj", 0.2))
    ]
    output = torch.randn(64, 64, generator=generator)
    found = place.weights(
        [Weights(masks[0], None), None, Weights(masks[1], None), Weights(output > 0, output.clamp_min(0))]
    )
    assert found is not None and found.keys() == {"q_proj.weight", "v_proj.weight", "o_proj.weight"}
    attention = model.model.layers[0].self_attn
    assert torch.equal(found["q_proj.weight"], attention.q_proj.weight * masks[0])
    assert torch.equal(found["v_proj.weight"], attention.v_proj.weight * masks[1])
    assert torch.equal(found["o_proj.weight"], output.clamp_min(0))


def test_codes_stand_in_for_the_weight(model_of: ModelOf) -> None:
    model = model_of("llama")
    place = a_place(model, bit_prunables(sub_blocks(model), (4,), 32), 1)
    codes = torch.arange(96 * 64).view(96, 64).remainder(16).byte()
    candidate = Quantised(codes, torch.full((96, 2), 0.5), torch.full((96, 2), 8).byte(), 4)
    found = place.weights([candidate, None, None])
    assert found is not None and found.keys() == {"gate_proj.weight"}
    assert torch.equal(found["gate_proj.weight"], (codes.float() - 8) / 2)


def test_transposed_layers_get_transposed_weights(model_of: ModelOf) -> None:
    """GPT-2 keeps (d_in, d_out)."""
    model = model_of("gpt2")
    place = a_place(model, weight_prunables(sub_blocks(model), ()))
    mask = torch.rand(place.part.weight("c_attn").shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = place.weights([Weights(mask, None), None])
    assert found is not None
    assert torch.equal(found["c_attn.weight"], model.transformer.h[0].attn.c_attn.weight * mask.T)
    assert found["c_attn.weight"].is_contiguous()


@pytest.mark.parametrize(
    ("candidate", "absent"),
    [
        (None, False),
        (Dropped(), True),
        (Members(torch.arange(0), None), True),
        (Members(torch.arange(0), torch.empty(64, 0), torch.ones(64)), True),
        (Members(torch.arange(1), None), False),
        (Weights(torch.zeros(64, 64, dtype=torch.bool), None), False),  # norms and biases are still there
    ],
)
def test_what_is_absent(candidate: Candidate | None, absent: bool) -> None:
    assert is_absent(candidate) is absent


@pytest.mark.parametrize("kind", ["sub-blocks", "blocks"])
def test_an_absent_sub_block_has_no_weights(any_model: PreTrainedModel, kind: str) -> None:
    place = a_place(any_model, presence_prunables(sub_blocks(any_model), kind == "blocks"))
    assert place.weights([None]) == {}
    assert place.weights([Dropped()]) is None
    with pytest.raises(ValueError, match=r"dropped and has no parameters"):
        parameters(place.part, None, Dropped())
    assert not full_weight(place.part, place.part.column, Dropped()).any()


def test_a_candidate_is_taken_in_the_dtype_of_the_model(model_of: ModelOf) -> None:
    part = sub_blocks(model_of("llama"))[1]
    grid = Quantised(torch.ones(64, 96).byte(), torch.ones(64, 3), torch.zeros(64, 3).byte(), 2)
    for candidate in (
        Weights(torch.eye(64, 96) > 0, torch.eye(64, 96).double()),
        grid,
        Members(torch.arange(2), torch.ones(64, 2).half()),
    ):
        assert full_weight(part, part.column, candidate).dtype == part.weight(part.column).dtype


KINDS = ("members", "compensated members", "query heads", "weights", "bits", "sub-blocks", "blocks")
CASES = [(name, kind) for name in ("llama_with_biases", "gemma2", "phi3", "opt", "gpt2") for kind in KINDS]
CASES += [(name, kind) for name in ("mamba", "mamba2") for kind in KINDS[3:]]  # mixers have no members


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_sub_block_with_a_candidate_is_the_dense_one_with_zeros(
    name: str, kind: str, model_of: ModelOf, supernet_of: SupernetOf, with_zeros: WithZeros, ids: Tensor
) -> None:
    model = model_of(name)
    supernet = supernet_of(model, kind)
    hidden, contexts = entry(model, ids)
    for allocation in (
        [1 + index % (len(u.levels) - 1) for index, u in enumerate(supernet.space.units)],
        [len(u.levels) - 1 for u in supernet.space.units],
    ):
        zeroed = sub_blocks(with_zeros(model, supernet, allocation))
        for place, reference in zip(places(model, supernet.space), zeroed, strict=True):
            weights = place.weights([supernet.candidate(index, allocation[index]) for index, _ in place.units])
            context = contexts[place.part.block]
            found = hidden if weights is None else place.part(hidden, context, weights)
            expected = reference(hidden, context)
            if weights is None and place.part.post_norm is None:  # nothing comes out of the one with zeros
                torch.testing.assert_close(expected, hidden, rtol=0, atol=0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Slicing


@torch.no_grad()
def test_sliced_equals_dense_with_zeros(
    family_model: PreTrainedModel, ids: Tensor, family_supernet: Supernet, with_zeros: WithZeros
) -> None:
    hidden, contexts = entry(family_model, ids)
    for level in (1, 2):
        zeroed = with_zeros(family_model, family_supernet, [level] * len(family_supernet.space.units))
        for index, (part, reference) in enumerate(zip(sub_blocks(family_model), sub_blocks(zeroed), strict=True)):
            candidate = family_supernet.candidate(index, level)
            assert isinstance(candidate, Members) and part.groups is not None
            weights = sliced(part, candidate)
            if part.groups.slices:
                context = contexts[part.block]
                torch.testing.assert_close(
                    part(hidden, context, weights), reference(hidden, context), rtol=1e-4, atol=1e-5
                )
            own = dict(part.module.named_parameters())
            removed = sum(own[name].numel() - w.numel() for name, w in weights.items())
            assert removed == (part.groups.members - len(candidate.kept)) * part.member_parameters


def test_members_without_weights_keep_the_dense_columns_and_may_bring_a_bias(model_of: ModelOf) -> None:
    part = sub_blocks(model_of("llama"))[0]
    assert part.groups is not None
    kept, bias = torch.tensor([0, 3]), torch.ones(64)
    found = sliced(part, Members(kept, None, bias))
    columns = member_columns(kept, part.groups.width)
    assert torch.equal(found["o_proj.weight"], part.weight("o_proj")[:, columns])
    assert torch.equal(found["q_proj.weight"], part.weight("q_proj")[columns])
    assert torch.equal(found["k_proj.weight"], part.weight("k_proj")[member_columns(kept, 8)])
    assert torch.equal(found["o_proj.bias"], bias)


@pytest.mark.parametrize("kind", ["members", "weights", "bits"])
def test_the_model_is_left_as_it_was(any_model: PreTrainedModel, supernet_of: SupernetOf, kind: str) -> None:
    parts = sub_blocks(any_model)
    if kind == "members" and not any(part.groups for part in parts):
        kind = "weights"
    supernet = supernet_of(any_model, kind)
    before = copy.deepcopy(any_model.state_dict())
    for place in places(any_model, supernet.space):
        for tensor in (place.weights([supernet.candidate(index, 1) for index, _ in place.units]) or {}).values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_slicing_is_chosen_by_what_the_family_can_do(model_of: ModelOf) -> None:
    def shapes(part: SubBlock) -> set[str]:
        assert part.groups is not None
        return set(parameters(part, None, Members(torch.arange(1), None)))

    attention, mlp = sub_blocks(model_of("opt"))[:2]
    assert attention.kind == ATTENTION
    assert shapes(attention) == {"out_proj.weight"}  # its own code takes the heads from the config: columns are zero
    assert shapes(mlp) == {"fc1.weight", "fc1.bias", "fc2.weight"}
    assert attention.groups is not None
    sliceable = replace(attention, groups=replace(attention.groups, slices=True))
    assert "q_proj.bias" in shapes(sliceable)
