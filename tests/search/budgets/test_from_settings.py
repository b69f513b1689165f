"""Budgets as they are set: each is a limit, all that are given are kept, and the impossible is refused with the
possible.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from search.budgets import costs
from search.budgets.budget import Budget
from search.budgets.costs import CostTable
from search.budgets.from_settings import make_budget, request_of
from search.budgets.knapsack import uniform
from search.budgets.settings import budget_record, given_limits
from search.evaluation.fitness import KlDivergence
from search.export.card import Facts, model_card
from search.inputs.models import LoadedModel, random_llama
from search.report.table import allocation_json, metrics_table
from search.report.warnings import warn_if_missed, warn_if_worse
from supernet.errors import InputError
from supernet.models.architecture import parameter_count, sub_blocks
from supernet.models.prunables import bit_prunables, member_prunables, weight_prunables
from supernet.space import Space, Unit

LLAMA = random_llama(0, 64, 256, 4, 8, 4, dtype=torch.float32).model  # not to be changed
EVEN = [1 - step / 8 for step in range(9)]


def member_space(model: PreTrainedModel = LLAMA) -> Space:
    prunables = member_prunables(sub_blocks(model), 8)
    return Space(tuple(Unit(p.name, p.kind, p.total, tuple(p.level(k) for k in levels(p.total))) for p in prunables))


def levels(total: int) -> list[int]:
    return sorted({round(total * share) for share in EVEN}, reverse=True)


def bit_space(model: PreTrainedModel = LLAMA) -> Space:
    prunables = bit_prunables(sub_blocks(model), [8, 4, 2], 32)
    return Space(tuple(Unit(p.name, p.kind, p.total, p.choices or ()) for p in prunables))


def no_latencies(space: Space) -> CostTable:
    raise AssertionError("nothing is to be measured")


def budget_of(space: Space, **given: Any) -> Budget:
    return make_budget(given, LLAMA, space, no_latencies)


def test_without_a_limit_a_quarter_goes() -> None:
    nothing: dict[str, Any] = dict.fromkeys(["sparsity", "bits", "parameters", "bytes", "flops", "speedup"])
    assert given_limits(nothing) == {"sparsity": 0.25}
    space = member_space()
    assert budget_of(space, **nothing) == Budget.from_sparsity(0.25, space)


def test_the_usual_one_does_not_join_another() -> None:
    assert given_limits({"sparsity": None, "parameters": 1e8}) == {"parameters": 1e8}
    assert list(given_limits({"speedup": 2, "flops": 1, "bytes": 1, "parameters": 1, "bits": 1, "sparsity": 0.1})) == [
        *("sparsity", "bits", "parameters", "bytes", "flops", "speedup")
    ]


def test_only_settings_that_matter_are_recorded() -> None:
    request = {"batch": 1, "prompt": 512, "generated": 0}
    every = {"sparsity": None, "parameters": None, "flops": None, "speedup": None, "sequence_length": 2048, **request}
    assert budget_record(every) == {"sparsity": 0.25}
    assert budget_record(every | {"flops": 1e9}) == {"flops": 1e9, "sequence_length": 2048}
    assert budget_record(every | {"speedup": 2, "parameters": 5}) == {"parameters": 5, "speedup": 2, **request}
    assert request_of(every).prompt == 512
    assert request_of({}).batch == 1


def test_parameters_are_the_whole_models() -> None:
    space, whole = member_space(), parameter_count(LLAMA)
    budget = budget_of(space, parameters=0.7 * whole)
    table = costs.parameters(LLAMA, space)
    assert budget.first.kind == "parameters"
    assert budget.first.target + table.rest == int(0.7 * whole)
    assert table.rest + budget.first.dense == whole


@pytest.mark.parametrize("size", ["500kB", "900 kB"])
def test_bytes_are_counted_as_the_file_has_them(size: str) -> None:
    space = member_space()
    budget = budget_of(space, bytes=size)
    assert budget.first.kind == "bytes"
    assert budget.first.target + costs.size(LLAMA, space, torch.float32).rest == int(size[:3]) * 1000
    assert budget.fits(uniform(space, budget))
    half = make_budget({"bytes": "400kB"}, LLAMA, space, no_latencies, torch.bfloat16)
    assert half.first.dense + (half.first.rest or 0) == 2 * parameter_count(LLAMA)


def test_several_limits_can_be_given_together() -> None:
    budget = budget_of(bit_space(), bits=6.0, sparsity=0.5)
    assert [limit.kind for limit in budget.limits] == ["bits", "bits"]
    assert budget.limits[0].target == 16 * 245_760
    assert budget.limits[1].target == 6 * 245_760


def test_flops_are_of_a_sequence() -> None:
    space = member_space()
    table = costs.flops(LLAMA, space, 128)
    budget = budget_of(space, flops=0.6 * table.dense, sequence_length=128)
    assert budget.first.kind == "flops"
    assert budget.first.target == int(0.6 * table.dense) - table.rest


def test_weights_count_where_they_stay() -> None:
    prunables = weight_prunables(sub_blocks(LLAMA), [])
    space = Space(tuple(Unit(p.name, p.kind, p.total, tuple(p.level(k) for k in levels(p.total))) for p in prunables))
    budget = budget_of(space, parameters=parameter_count(LLAMA) - 100_000)
    assert budget.first.dense - budget.first.target == 100_000


@settings(deadline=None, max_examples=60)
@given(
    sparsity=st.none() | st.floats(0.05, 0.9),
    parameters=st.none() | st.floats(0.2, 0.99),
    size=st.none() | st.floats(0.2, 0.99),
    flops=st.none() | st.floats(0.2, 0.99),
)
def test_all_that_are_given_are_kept(sparsity: Any, parameters: Any, size: Any, flops: Any) -> None:
    space = member_space()
    tables = {
        "parameters": costs.parameters(LLAMA, space),
        "bytes": costs.size(LLAMA, space, torch.float32),
        "flops": costs.flops(LLAMA, space, 64),
    }
    shares = {"parameters": parameters, "bytes": size, "flops": flops}
    wanted = {name: int(share * tables[name].dense) for name, share in shares.items() if share is not None}
    budget = budget_of(space, sparsity=sparsity, sequence_length=64, **wanted)
    assert len(budget.limits) == max(1, len(wanted) + (sparsity is not None))
    allocation = uniform(space, budget)
    for name, most in wanted.items():
        table = tables[name]
        assert table.rest + sum(row[level] for row, level in zip(table.costs, allocation, strict=True)) <= most
    if sparsity is not None:
        # 0.1 is a little less in floating point
        assert space.cost(allocation) <= round((1 - sparsity) * space.dense_cost, 6)
    assert budget.met(allocation)


@pytest.mark.parametrize(
    ("given_settings", "expected"),
    [
        (
            {"parameters": 279_232},
            r"budget\.parameters=279232 is no less than the 279,232 parameters of the dense model",
        ),
        ({"parameters": 5e9}, r"no less than the 279,232 parameters"),
        ({"parameters": 30_000}, r"is below the 32,960 parameters of what is not pruned .*can have 32,960 to 279,232"),
        ({"bytes": "2MB"}, r"budget\.bytes=2MB is no less than the 1,116,928 bytes"),
        ({"bytes": 10}, r"budget\.bytes=10 is below the 131,840 bytes of what is not pruned"),
        ({"flops": 1e15, "sequence_length": 64}, r"no less than the [\d,]+ flops of the dense model"),
        ({"bits": 4}, r"budget\.bits=4 is for bit widths"),
        ({"sparsity": 0.1, "bits": 4}, r"budget\.bits=4 is for bit widths"),
    ],
)
def test_the_impossible_is_refused(given_settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        budget_of(member_space(), **given_settings)


def test_less_than_the_sparsest_levels_is_refused_with_what_they_take() -> None:
    prunables = member_prunables(sub_blocks(LLAMA), 8)
    space = Space(tuple(Unit(p.name, p.kind, p.total, (p.level(p.total), p.level(p.total // 2))) for p in prunables))
    with pytest.raises(
        InputError, match=r"budget\.parameters=100000 cannot be met: .* 156,352 parameters are left; .*supernet\.step"
    ):
        budget_of(space, parameters=100_000)


def weight_space(model: PreTrainedModel = LLAMA) -> Space:
    prunables = weight_prunables(sub_blocks(model), [])
    return Space(tuple(Unit(p.name, p.kind, p.total, (p.level(p.total), p.level(p.total // 2))) for p in prunables))


def head_space(model: PreTrainedModel) -> Space:
    prunables = member_prunables(sub_blocks(model), 8, query_heads=True)
    return Space(tuple(Unit(p.name, p.kind, p.total, (p.level(p.total), p.level(p.total // 2))) for p in prunables))


@pytest.mark.parametrize("name", ["phi3", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["parameters", "bytes", "flops"])
def test_what_the_file_would_not_have_is_not_promised(
    name: str, kind: str, model_of: Callable[..., PreTrainedModel]
) -> None:
    given = {kind: 150_000, "sequence_length": 64}
    with pytest.raises(InputError, match=rf"budget\.{kind}=150000: .*budget\.bits or budget\.sparsity"):
        budget_of(bit_space(), **given)
    model = model_of(name)
    with pytest.raises(InputError, match=rf"budget\.{kind}=150000: single query heads of '{name}' .*query_heads=false"):
        make_budget(given, model, head_space(model), no_latencies)
    if kind == "bytes":
        with pytest.raises(
            InputError, match=r"single weights that are zero are written all the same; use budget\.sparsity"
        ):
            budget_of(weight_space(), **given)


@pytest.mark.parametrize("name", ["parameters", "flops"])
def test_bit_widths_change_neither_parameters_nor_flops(name: str) -> None:
    with pytest.raises(InputError, match=rf"budget\.{name}=5: fewer bits leave {name} as they are; use budget\.bits"):
        budget_of(bit_space(), **{name: 5, "sequence_length": 64})


# Reports

FACTS = Facts("m", "obs", "guided", False, KlDivergence.goal, "bfloat16", False)


ROW = {"parameters": 1000, "nonzero_parameters": 999, "kl_divergence": 0.1, "kl_divergence_error": None}
ROW |= {"perplexity": 10.0, "perplexity_error": 0.5}
APART = {"kl_divergence": -0.01, "kl_divergence_error": 0.002, "log_perplexity": -0.01, "log_perplexity_error": 0.002}


def test_reports_name_what_was_limited(tiny_llama: LoadedModel) -> None:
    space = member_space()
    budget = budget_of(space, flops=1e9, sequence_length=2048, parameters=200_000)
    content = allocation_json(space, uniform(space, budget), budget, {"name": "m"})
    assert content["budget"]["kind"] == "parameters"
    assert [limit["kind"] for limit in content["budget"]["besides"]] == ["flops"]
    for limit in (content["budget"], *content["budget"]["besides"]):
        assert limit["achieved"] <= limit["target"] < limit["dense"]
        assert limit["rest"] + limit["target"] == {"parameters": 200_000, "flops": 1e9}[limit["kind"]]
    assert "% of the prunable parameters of `m` were removed" in model_card(FACTS, None, content)
    content["budget"] = content["budget"]["besides"][0]
    assert "% of the FLOPs of the prunable layers of `m` were removed" in model_card(FACTS, None, content)


def test_a_missed_speedup_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_missed({"speedup": 1.44, "asked": 1.5})
    assert not caplog.records
    warn_if_missed({"speedup": 1.4, "asked": 1.5})
    assert "1.40 times as fast, not 1.5 times as asked" in caplog.text


@pytest.mark.parametrize(
    ("searched", "error", "lost"),
    [(0.52, 0.03, False), (0.52, 0.01, True), (0.52, None, False), (0.48, 0.001, False), (math.nan, math.nan, True)],
)
def test_a_search_that_lost_by_more_than_the_error_is_flagged(
    searched: float, error: float | None, lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    apart = {"kl_divergence": searched - 0.5, "kl_divergence_error": error}
    metrics = {
        "searched": {"kl_divergence": searched},
        "uniform": {"kl_divergence": 0.5},
        "searched_minus_uniform": apart,
    }
    warn_if_worse(metrics, rule=False)
    warn_if_worse(metrics, rule=True)
    advice = ["search longer (strategy.generations)", "use another strategy"] if lost else []
    assert len(caplog.messages) == len(advice)
    for message, words in zip(caplog.messages, advice, strict=True):
        assert f"(KL {searched:g} and 0.5): {words}" in message


def test_a_measured_speedup_is_told() -> None:
    rows = {name: ROW | {"kept": 0.5} for name in ("dense", "uniform", "searched")} | {"searched_minus_uniform": APART}
    measured = {"speedup": 1.482, "asked": 1.45, "promised": 1.5}
    measured |= {"searched_seconds": 0.0135, "dense_seconds": 0.02, "device": "A CPU"}
    request = {"batch": 2, "prompt": 512, "generated": 64}
    last = metrics_table(rows | {"latency": measured | request}).splitlines()[-1]
    times = "0.0135 instead of 0.02 s for 2 x 512 + 64 tokens on A CPU"
    assert last == f"1.48 times as fast as dense (1.45 asked for, 1.50 expected): {times}"
    assert "times as fast" not in metrics_table(rows)
    lines = metrics_table(rows).splitlines()
    assert lines[3].endswith("10.00 ± 0.50              0.1000")
    assert "not zero" not in lines[0]
    sparse = metrics_table(rows | {"searched": rows["searched"] | {"nonzero_parameters": 623}}).splitlines()
    assert "parameters      not zero     kept" in sparse[0]
    assert sparse[3].split()[:3] == ["searched", "1,000", "623"]
    assert lines[4] == "searched - uniform, on the same sequences: KL -0.0100 ± 0.0020"
    rows["dense"] |= {"kl_divergence": -1e-9}
    assert " 0.0000" in metrics_table(rows).splitlines()[1]  # not -0.0000
