"""Latencies: what is measured once is kept, never rises with sparsity, and adds up to what a budget promises."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from search.budgets import latency as latency_module
from search.budgets.budget import Budget
from search.budgets.costs import CostTable
from search.budgets.from_settings import make_budget
from search.budgets.knapsack import uniform
from search.budgets.latency import LatencyTable, ModelToTime, UnitClass, check_faster, rising, settle, sliced
from search.budgets.timing import Request, Seconds, compare, speedup
from search.inputs.models import LoadedModel
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import assemble
from supernet.models.prunables import member_prunables, presence_prunables, weight_prunables
from supernet.space import Space, Unit

BLOCKS = 4
KEPT = {"attention": (4, 3, 2, 0), "mlp": (256, 192, 64)}
FINER = {"attention": (4, 3, 2, 1, 0), "mlp": (256, 224, 192, 128, 64)}
CPU = torch.device("cpu")
REQUEST = Request(batch=1, prompt=16, generated=10)


def space_of(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> Space:
    prunables = member_prunables(sub_blocks(model), 1)
    return Space(
        tuple(Unit(p.name, p.kind, p.total, tuple(p.level(count) for count in kept[p.kind])) for p in prunables)
    )


def heads_and_neurons(model: PreTrainedModel) -> tuple[int, int]:
    """Of all layers together: KV groups and neurons."""
    layers = model.model.layers
    groups = sum(layer.self_attn.k_proj.out_features // 8 for layer in layers if hasattr(layer.self_attn, "k_proj"))
    return groups, sum(layer.mlp.down_proj.in_features for layer in layers if hasattr(layer.mlp, "down_proj"))


class FakeTimer:
    """A model of 1 ms, and 1 ms a KV group and 10 us a neuron, times noise that falls on neighbouring passes alike."""

    def __init__(self, noise: float = 0.0) -> None:
        self.passes = 0
        self.noise, self.rng = noise, np.random.default_rng(0)

    def __call__(self, model: PreTrainedModel, ids: Tensor, generated: int) -> Seconds:
        assert ids.shape == (REQUEST.batch, REQUEST.prompt)
        if self.passes % 2 == 0:
            self.load = 1.0 + self.noise * self.rng.random()
        self.passes += 1
        groups, neurons = heads_and_neurons(model)
        prefill = self.load * (1e-3 + 1e-3 * groups + 1e-5 * neurons)
        return Seconds(prefill, prefill / 16 if generated else 0.0)


def untracked(items: Sequence[ModelToTime], title: str) -> Sequence[ModelToTime]:
    return items


def opened(model: PreTrainedModel, timer: Any, request: Request = REQUEST) -> LatencyTable:
    return LatencyTable(model, request, CPU, model.dtype, timer)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSITY_SEARCH_CACHE", str(tmp_path))


@pytest.fixture
def model(tiny_llama: LoadedModel) -> PreTrainedModel:
    return tiny_llama.model


def milliseconds(table: CostTable) -> list[list[float]]:
    return [[round(cost / 1e6, 6) for cost in row] for row in table.costs]


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_units_take_what_the_timer_says(noise: float, model: PreTrainedModel) -> None:
    """Also where the machine is up to six times as slow at times."""
    space = space_of(model, KEPT)
    table = opened(model, FakeTimer(noise))
    table.measure(space, untracked)
    costs = table.costs(space)
    assert table.dense is not None
    # how slow it was meanwhile; with the decoded tokens
    scale = table.dense.prefill / (1e-3 + 16e-3 + 10.24e-3) * (1 + 10 / 16)
    expected = [[4, 3, 2, 0], [2.56, 1.92, 0.64]] * BLOCKS
    for row, of_unit in zip(milliseconds(costs), expected, strict=True):
        np.testing.assert_allclose(row, np.array(of_unit) * scale, rtol=1e-4, atol=1e-5)
    assert costs.rest == pytest.approx(1e6 * scale, rel=1e-3)


def test_the_time_of_the_whole_model_adds_up(model: PreTrainedModel) -> None:
    space = space_of(model, KEPT)
    table = opened(model, FakeTimer())
    table.measure(space, untracked)
    costs = table.costs(space)
    assert costs.dense == pytest.approx(1e9 * FakeTimer()(model, torch.zeros(1, 16), 0).prefill * (1 + 10 / 16), abs=1)


def test_what_was_measured_is_not_measured_again(model: PreTrainedModel) -> None:
    space, timer = space_of(model, KEPT), FakeTimer()
    first = opened(model, timer)
    # of attention 3, 2, 0; of MLPs 192, 64 and 0; and without all of them
    assert len(first.missing(space)) == 3 + 3 + 1
    first.measure(space, untracked)
    passes = timer.passes
    again = opened(model, timer)
    assert again.missing(space) == []
    again.measure(space, untracked)
    assert again.costs(space) == first.costs(space)
    assert timer.passes == passes


def test_a_later_round_measures_its_new_levels_alone_and_moves_no_old_cost(model: PreTrainedModel) -> None:
    space, finer = space_of(model, KEPT), space_of(model, FINER)
    table = opened(model, FakeTimer())
    table.measure(space, untracked)
    before = table.costs(space)

    def backwards(model: PreTrainedModel, ids: Tensor, generated: int) -> Seconds:
        """The less there is, the longer it takes."""
        taken = FakeTimer()(model, ids, generated)
        return Seconds(1e-3 / taken.prefill, 1e-3 / taken.prefill)

    table.timer = backwards
    assert sorted({point.kept for point in table.missing(finer)}) == [1, 128, 224]
    table.measure(finer, untracked)
    assert table.costs(space) == before
    for row in table.costs(finer).costs:
        assert list(row) == sorted(row, reverse=True)


def test_a_killed_measurement_goes_on_where_it_was(model: PreTrainedModel) -> None:
    space, timer = space_of(model, KEPT), FakeTimer()

    def killed(items: Sequence[ModelToTime], title: str) -> Any:
        yield from items[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(model, timer).measure(space, killed)
    rest = opened(model, timer)
    assert len(rest.missing(space)) == 5
    rest.measure(space, untracked)
    whole = opened(model, FakeTimer())
    whole.path.unlink()
    whole = opened(model, FakeTimer())
    whole.measure(space, untracked)
    assert rest.costs(space) == whole.costs(space)


def test_two_processes_that_measure_at_once_lose_nothing_of_each_other(model: PreTrainedModel) -> None:
    """Each has opened the table before the other wrote; what was settled first stays what a budget was made of."""
    space, finer = space_of(model, KEPT), space_of(model, FINER)
    one, other = opened(model, FakeTimer()), opened(model, FakeTimer(noise=3.0))
    one.measure(space, untracked)
    before = one.costs(space)
    other.measure(finer, untracked)
    both = opened(model, FakeTimer())
    assert not both.missing(space) and not both.missing(finer)
    for table in (one, other, both):
        assert table.costs(space) == before


def test_the_table_is_written_under_a_lock(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    table, write, writes = opened(model, FakeTimer()), latency_module.write_atomic, 0

    def locked_write(path: Path, data: bytes) -> None:
        nonlocal writes
        with pytest.raises(Timeout):
            FileLock(path.with_name(f".{path.name}.lock"), timeout=0, thread_local=False).acquire()
        write(path, data)
        writes += 1

    monkeypatch.setattr(latency_module, "write_atomic", locked_write)
    table.measure(space_of(model, KEPT), untracked)
    assert writes > 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\0"])
def test_a_damaged_table_is_refused_with_its_name(content: str, model: PreTrainedModel) -> None:
    table = opened(model, FakeTimer())
    table.path.parent.mkdir(parents=True, exist_ok=True)
    table.path.write_text(content)
    with pytest.raises(InputError, match=r"latencies in .*/latency/llama-.*\.json are damaged; delete that file"):
        opened(model, FakeTimer())


@pytest.mark.parametrize(
    "harm", [{"dense": {"prefill": float("nan"), "decode": 0}}, {"dense": 3}, {"classes": {"mlp": {}}}]
)
def test_a_table_with_nonsense_in_it_is_refused(harm: dict[str, Any], model: PreTrainedModel) -> None:
    table = opened(model, FakeTimer())
    table.measure(space_of(model, KEPT), untracked)
    table.path.write_text(json.dumps(json.loads(table.path.read_text()) | harm))
    with pytest.raises(InputError, match="damaged"):
        opened(model, FakeTimer())


def test_the_table_says_what_was_measured_where(model: PreTrainedModel) -> None:
    table = opened(model, FakeTimer())
    table.measure(space_of(model, KEPT), untracked)
    content = json.loads(table.path.read_text())
    assert content["key"].keys() >= {
        "model",
        "dtype",
        "torch",
        "machine",
        "device",
        "threads",
        "batch",
        "prompt",
        "generated",
    }
    assert content["date"] and content["dense"].keys() == {"prefill", "decode"}
    assert [each["units"] for each in content["classes"].values()] == [BLOCKS, BLOCKS]


def test_other_requests_and_models_have_tables_of_their_own(
    model: PreTrainedModel, model_of: Callable[..., PreTrainedModel]
) -> None:
    models = [model, model_of("llama"), model_of("llama_with_biases")]
    requests = [REQUEST, replace(REQUEST, batch=2), replace(REQUEST, prompt=17), replace(REQUEST, generated=0)]
    assert len({opened(one, FakeTimer(), request).path for one in models for request in requests}) == 12


def test_layers_of_other_sizes_or_kinds_are_measured_apart(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("gemma3")  # attention with a window, and without
    space = space_of(model, {"attention": (4, 2), "mlp": (96, 32)})
    assert len(opened(model, FakeTimer()).missing(space)) == 2 * 2 + 2 + 1


def test_times_that_do_not_add_up_are_scaled_to_what_the_units_take_together(model: PreTrainedModel) -> None:
    def saturated(model: PreTrainedModel, ids: Tensor, generated: int) -> Seconds:
        """Twice as fast without attention, twice without MLPs, and a quarter of the time without both."""
        groups, neurons = heads_and_neurons(model)
        return Seconds((1 + groups / 16) * (1 + neurons / 1024), 0.0)

    space = space_of(model, KEPT)
    table = opened(model, saturated, replace(REQUEST, generated=0))
    table.measure(space, untracked)
    costs = table.costs(space)
    assert (costs.dense, costs.rest) == (4_000_000_000, 1_000_000_000)
    assert [row[0] for row in costs.costs] == [375_000_000] * 8  # 0.5 each before


def test_a_busy_machine_is_told(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    opened(model, FakeTimer()).measure(space_of(model, KEPT), untracked)
    assert caplog.text == ""
    busy = FakeTimer()

    def ever_slower(model: PreTrainedModel, ids: Tensor, generated: int) -> Seconds:
        taken = busy(model, ids, generated)
        return Seconds(taken.prefill * (1 + busy.passes // 20), taken.decode)

    opened(model, ever_slower, replace(REQUEST, generated=1)).measure(space_of(model, KEPT), untracked)
    assert "the dense model took between" in caplog.text


# Monotone


@given(st.lists(st.floats(-10, 10), max_size=8))
def test_rising_is_the_nearest_sequence_that_never_falls(values: list[float]) -> None:
    found = rising(values)
    assert len(found) == len(values)
    assert all(a <= b + 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)
    if values == sorted(values):
        assert found == values


BATCHES = st.lists(st.dictionaries(st.integers(0, 12), st.floats(-5, 5), max_size=5), min_size=1, max_size=4)


@given(BATCHES)
def test_settled_savings_never_fall_nor_move(batches: list[dict[int, float]]) -> None:
    each = UnitClass(1)
    for batch in [batches[0] | {0: 1.0}, *batches[1:]]:
        before = dict(each.settled)
        each.measured |= {kept: Seconds(saved, -saved) for kept, saved in batch.items() if kept not in each.measured}
        settle(each)
        assert each.settled.keys() == each.measured.keys()
        assert {kept: each.settled[kept] for kept in before} == before
        saved = [each.settled[kept] for kept in sorted(each.settled, reverse=True)]
        for a, b in zip([Seconds(0.0, 0.0), *saved], saved, strict=False):
            assert a.prefill <= b.prefill + 1e-9
            assert a.decode <= b.decode + 1e-9


# Budgets


def measured(model: PreTrainedModel, space: Space) -> CostTable:
    table = opened(model, FakeTimer())
    table.measure(space, untracked)
    return table.costs(space)


def budget_of(model: PreTrainedModel, space: Space, **settings: Any) -> Budget:
    return make_budget(settings, model, space, lambda space: measured(model, space))


@pytest.mark.parametrize("wanted", [1.05, 1.5, 2.5])
def test_a_budget_makes_the_model_so_many_times_as_fast(wanted: float, model: PreTrainedModel) -> None:
    space = space_of(model, FINER)
    budget = budget_of(model, space, speedup=wanted)
    assert budget.first.kind == "latency"
    allocation = uniform(space, budget)
    table = measured(model, space)
    reached = table.dense / (table.rest + budget.first.cost(allocation))
    assert wanted <= reached < 1.2 * wanted


def test_a_speedup_that_nothing_reaches_is_refused_with_what_can_be(model: PreTrainedModel) -> None:
    with pytest.raises(
        InputError, match=r"budget\.speedup=10 cannot be met: .* measured 7\.6.* times as fast; .*supernet\.levels"
    ):
        budget_of(model, space_of(model, KEPT), speedup=10)


def test_what_gets_no_faster_is_refused(model: PreTrainedModel) -> None:
    weights = weight_prunables(sub_blocks(model), [])
    heads = member_prunables(sub_blocks(model), 1, query_heads=True)
    for prunables in (weights, heads):
        space = Space(tuple(Unit(p.name, p.kind, p.total, (p.level(p.total), p.level(0))) for p in prunables))
        with pytest.raises(
            InputError, match=r"budget\.speedup=2 is for pruning that makes layers smaller; .*prune=depth"
        ):
            check_faster(space, "budget.speedup=2")


def test_a_prompt_longer_than_the_model_knows_is_refused(model_of: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(InputError, match=r"budget\.prompt=30 and budget\.generated=11 are more than the 40 tokens"):
        opened(model_of("gpt2"), FakeTimer(), Request(1, 30, 11))


def test_the_measured_speedup_is_a_median_of_passes_in_turns(model: PreTrainedModel) -> None:
    sparser = space_of(model, KEPT)
    half = random_half(model, sparser)
    found = speedup(model, half, REQUEST, FakeTimer(noise=3.0))
    dense, pruned = (FakeTimer()(one, torch.zeros(1, 16), 0).prefill for one in (model, half))
    assert found["speedup"] == pytest.approx(dense / pruned, abs=1e-3)
    assert found["dense_seconds"] / found["searched_seconds"] == pytest.approx(dense / pruned, rel=1e-3)
    assert found["prompt"] == 16 and found["machine"] and found["device"]


def random_half(model: PreTrainedModel, space: Space) -> PreTrainedModel:
    return assemble(model, *sliced(space, [unit if unit.kind == "mlp" else None for unit in space.units], 64))


# With a real clock


@pytest.mark.sampled
@pytest.mark.parametrize("generated", [0, 3])
def test_every_family_can_be_timed(generated: int, any_model: PreTrainedModel) -> None:
    """Whole, and without all of its attentions, MLPs or mixers."""
    prunables = presence_prunables(sub_blocks(any_model), False)
    space = Space(tuple(Unit(p.name, p.kind, 1, p.choices or ()) for p in prunables))
    table = LatencyTable(any_model, Request(2, 8, generated), CPU, any_model.dtype)
    table.measure(space, untracked)
    costs = table.costs(space)
    assert costs.dense > 0
    assert all(row[0] >= row[1] == 0 for row in costs.costs)
    assert table.dense is not None and (table.dense.decode > 0) == (generated > 0)


def test_a_pass_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken, share = compare(model, model, Request(1, 8, 2))
    assert taken.prefill > 0 and taken.decode > 0
    assert 0.5 < share.prefill < 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
