"""What levels take, against the models that are assembled from them: parameters, bytes, and the FLOPs that torch
counts.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from search.budgets import costs
from search.budgets.costs import CostTable
from search.budgets.latency import sliced
from supernet.models.architecture import parameter_count, sub_blocks
from supernet.models.assemble import assemble
from supernet.models.prunables import bit_prunables, member_prunables, presence_prunables, weight_prunables
from supernet.space import MLP, Allocation, Level, Space, Unit
from supernet.store import Supernet

TOKENS = 12  # of `ids`
WINDOW = (
    5  # of the random models that have one: where a sequence is no longer, masks hide nothing that the counter counts
)
TABLES: dict[str, Callable[[PreTrainedModel, Space], CostTable]] = {
    "parameters": costs.parameters,
    "bytes": lambda m, s: costs.size(m, s, m.dtype),
    "flops": lambda m, s: costs.flops(m, s, WINDOW),
}


def of_whole(table: CostTable, allocation: Allocation) -> int:
    return table.rest + sum(row[level] for row, level in zip(table.costs, allocation, strict=True))


def counted_flops(model: PreTrainedModel, ids: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids[:1, :WINDOW], use_cache=False)
    return int(counter.get_total_flops())


def space_of_presence(model: PreTrainedModel, whole_blocks: bool) -> Space:
    prunables = presence_prunables(sub_blocks(model), whole_blocks)
    return Space(tuple(Unit(p.name, p.kind, p.total, p.choices or ()) for p in prunables))


def space_of_choices(model: PreTrainedModel, bits: bool) -> Space:
    """Bit widths, or three levels of single weights, of every linear layer."""
    parts = sub_blocks(model)
    if bits:
        return Space(tuple(Unit(p.name, p.kind, p.total, p.choices or ()) for p in bit_prunables(parts, [8, 4], 32)))
    units = []
    for p in weight_prunables(parts, []):
        units.append(Unit(p.name, p.kind, p.total, tuple(p.level(kept) for kept in (p.total, p.total // 2, 0))))
    return Space(tuple(units))


def test_of_members_they_are_those_of_the_assembled_model(
    family_model: PreTrainedModel,
    family_supernet: Supernet,
    random_allocations: Callable[..., Sequence[Allocation]],
    ids: Tensor,
) -> None:
    space = family_supernet.space
    tables = {name: table(family_model, space) for name, table in TABLES.items()}
    last = tuple(len(unit.levels) - 1 for unit in space.units)
    for allocation in [(0,) * len(space.units), last, *random_allocations(space, 4)]:
        model = assemble(family_model, family_supernet, allocation)
        model.set_attn_implementation("eager")  # the counter knows no fused attention on CPUs
        assert of_whole(tables["parameters"], allocation) == parameter_count(model)
        assert of_whole(tables["bytes"], allocation) == sum(p.numel() * p.element_size() for p in model.parameters())
        assert of_whole(tables["flops"], allocation) == counted_flops(model, ids)
    assert tables["parameters"].dense == parameter_count(family_model)


@pytest.mark.sampled
@pytest.mark.parametrize("whole_blocks", [True, False])
def test_of_depth_they_are_those_of_the_assembled_model(
    whole_blocks: bool, any_model: PreTrainedModel, random_allocations: Callable[..., Sequence[Allocation]]
) -> None:
    space = space_of_presence(any_model, whole_blocks)
    tables = {name: table(any_model, space) for name, table in TABLES.items()}
    for allocation in random_allocations(space, 4):
        chosen = [unit if level else None for unit, level in zip(space.units, allocation, strict=True)]
        model = assemble(any_model, *sliced(space, chosen, 0))
        assert of_whole(tables["parameters"], allocation) == parameter_count(model)
        assert of_whole(tables["bytes"], allocation) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "windowed"), [("llama", 0), ("mistral", 3), ("qwen2", 2), ("gemma2", 2), ("gemma3", 2), ("phi3", 3)]
)
def test_a_window_is_all_that_a_token_looks_at(
    name: str, windowed: int, model_of: Callable[..., PreTrainedModel]
) -> None:
    model = model_of(name)
    space = space_of_presence(model, False)
    table = costs.flops(model, space, TOKENS)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    pairs = windowed * TOKENS * WINDOW + (3 - windowed) * TOKENS * TOKENS
    assert table.dense == 2 * TOKENS * linear + 4 * 64 * pairs  # 64 channels of all query heads


def test_flops_of_mixers_are_those_of_their_linear_layers(mixer_model: PreTrainedModel) -> None:
    table = costs.flops(mixer_model, space_of_presence(mixer_model, False), TOKENS)
    layers = [module for module in mixer_model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)]
    assert table.dense == 2 * TOKENS * sum(layer.weight.numel() for layer in layers)
    assert table.rest == 2 * TOKENS * mixer_model.get_output_embeddings().weight.numel()


def test_of_single_weights_those_that_stay_count(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama_with_biases")
    space = space_of_choices(model, bits=False)
    table, flops = costs.parameters(model, space), costs.flops(model, space, TOKENS)
    assert table.costs == tuple(tuple(level.kept for level in unit.levels) for unit in space.units)
    assert table.dense == parameter_count(model)
    assert flops.costs == tuple(tuple(2 * TOKENS * level.kept for level in unit.levels) for unit in space.units)
    attention = 3 * 4 * TOKENS * TOKENS * 64  # layers, tokens, channels of all query heads
    assert flops.rest == attention + 2 * TOKENS * model.lm_head.weight.numel()
    written = costs.size(model, space, torch.bfloat16)  # zeros are written, too
    assert written.dense == 2 * parameter_count(model) and all(len(set(row)) == 1 for row in written.costs)


def test_of_bits_nothing_falls_as_they_are_written_at_full_width(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama").bfloat16()
    space = space_of_choices(model, bits=True)
    for table in (
        costs.parameters(model, space),
        costs.flops(model, space, TOKENS),
        costs.size(model, space, torch.bfloat16),
    ):
        assert all(len(set(row)) == 1 for row in table.costs)
    assert costs.size(model, space, torch.bfloat16).dense == 2 * parameter_count(model)


def test_query_heads_take_their_queries_and_outputs_with_them(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama")
    prunables = [p for p in member_prunables(sub_blocks(model), 1, query_heads=True) if p.kind != MLP]
    units = tuple(Unit(p.name, p.kind, p.total, tuple(Level(k, k * p.each) for k in (8, 5, 1, 0))) for p in prunables)
    table, flops = costs.parameters(model, Space(units)), costs.flops(model, Space(units), TOKENS)
    head = 2 * 8 * 64
    for row in table.costs:
        assert [row[0] - cost for cost in row[:3]] == [0, 3 * head, 7 * head]
        assert row[3] == 0  # keys, values and the norm go, too
    assert [flops.costs[0][0] - cost for cost in flops.costs[0][:3]] == [
        k * (2 * TOKENS * head + 4 * TOKENS**2 * 8) for k in (0, 3, 7)
    ]


def test_a_bias_that_makes_up_for_members_counts(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama")
    prunables = member_prunables(sub_blocks(model), 1, bias=True)
    space = Space(tuple(Unit(p.name, p.kind, p.total, tuple(p.level(k) for k in (p.total, 1, 0))) for p in prunables))
    plain = Space(
        tuple(Unit(p.name, p.kind, p.total, tuple(Level(k, k * p.each) for k in (p.total, 1, 0))) for p in prunables)
    )
    for row, without in zip(costs.parameters(model, space).costs, costs.parameters(model, plain).costs, strict=True):
        assert [a - b for a, b in zip(row, without, strict=True)] == [0, 64, 0]


@settings(deadline=None, max_examples=30)
@given(kept=st.lists(st.integers(0, 95), unique=True), tokens=st.integers(1, 5000), data=st.data())
def test_costs_never_rise(
    model_of: Callable[..., PreTrainedModel], kept: list[int], tokens: int, data: st.DataObject
) -> None:
    model = model_of(data.draw(st.sampled_from(["llama", "gpt2", "gemma2"])))
    units = []
    for p in member_prunables(sub_blocks(model), 1):
        counts = sorted({k % p.total for k in kept} | {p.total}, reverse=True)
        units.append(Unit(p.name, p.kind, p.total, tuple(p.level(k) for k in counts)))
    space = Space(tuple(units))
    for table in (
        costs.parameters(model, space),
        costs.size(model, space, model.dtype),
        costs.flops(model, space, tokens),
    ):
        assert table.rest > 0
        for row in table.costs:
            assert list(row) == sorted(row, reverse=True)
            assert row[-1] >= 0
