"""Grids, rounding and GPTQ against brute force in float64, and what every quantiser must keep to."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from local_prune.methods.gptq import GptqPruner
from local_prune.methods.rtn import RtnPruner
from local_prune.methods.shared.grids import CLIPPED_BITS, POWER, SHRINKS, Layout, grids
from local_prune.pruner import Pruner, Task
from local_prune.statistics import LeastSquares
from supernet.candidates import Quantised
from supernet.errors import InputError

MakeLayer = Callable[..., Any]
WIDTHS = [8, 6, 4, 2]


def task_of(case: Any) -> Task:
    return Task("unit", case.dense, case.problem)


def quantised(pruner: Pruner, case: Any, kept: Sequence[int] = WIDTHS) -> list[Quantised]:
    found = pruner.candidates(task_of(case), kept)
    assert all(isinstance(candidate, Quantised) for candidate in found)
    return found  # type: ignore[return-value]


def error_of(case: Any, candidate: Quantised) -> float:
    return case.error(torch.arange(case.dense.shape[1]), candidate.weight)


def same(codes: Tensor, expected: Tensor) -> float:
    """The share of equal codes: float32 may round a weight in the middle of two codes the other way."""
    return float((codes.double() == expected.double()).double().mean())


def best_grid(
    weights: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, cost: Tensor | None
) -> tuple[float, float]:
    """Scale and zero of one group of one output, (group,) float64, with every shrink factor tried; `cost`: of squared
    errors.
    """
    top, found = 2**bits - 1, (1.0, 0.0)
    least = torch.inf
    for shrink in SHRINKS if bits <= CLIPPED_BITS else [1.0]:
        low, high = min(0.0, float(weights.min())) * shrink, max(0.0, float(weights.max())) * shrink
        span = 2 * max(-low, high) if symmetric else high - low
        scale = float(torch.tensor(span / top, dtype=torch.float64).to(dtype)) or 1.0
        zero = 2.0 ** (bits - 1) if symmetric else float(min(max(round(-low / scale), 0), top))
        values = (scale * ((weights / scale).round().clamp(-zero, top - zero))).to(dtype).double()
        error = (values - weights).abs()
        loss = float((error**POWER).sum() if cost is None else (cost * error**2).sum())
        if loss < least:
            least, found = loss, (scale, zero)
    return found


def best_grids(W: Tensor, bits: int, layout: Layout, cost: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zeros (d_in, d_out), one for every weight of W (d_in, d_out)."""
    scale, zero = torch.empty_like(W), torch.empty_like(W)
    for start in range(0, len(W), layout.group):
        inputs = slice(start, start + layout.group)
        for o in range(W.shape[1]):
            costs = None if cost is None else cost[inputs]
            scale[inputs, o], zero[inputs, o] = best_grid(W[inputs, o], bits, layout.symmetric, layout.dtype, costs)
    return scale, zero


def nearest(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((w / scale).round() + zero).clamp(0, 2**bits - 1)


def textbook(case: Any, bits: int, layout: Layout, damping: float, activation_order: bool) -> Tensor:
    """Codes (d_in, d_out) by the two equations of OBQ (Frantar et al. 2023, 2 and 3) in float64, one input after the
    other.
    """
    A, B = case.augmented(damping)
    inverse = torch.linalg.inv(A.T @ A)
    W = inverse @ (A.T @ B)
    cost = 1.0 / inverse.diagonal()
    scale, zero = best_grids(W, bits, layout, cost)
    codes = torch.empty_like(W)
    order = (A**2).sum(0).argsort(descending=True, stable=True) if activation_order else torch.arange(len(W))
    for step, j in enumerate(order.tolist()):
        if not activation_order and j % layout.group == 0:
            inputs = slice(j, j + layout.group)
            scale[inputs], zero[inputs] = best_grids(W[inputs], bits, layout, cost[inputs])
        codes[j] = nearest(W[j], scale[j], zero[j], bits)
        value = (scale[j] * (codes[j] - zero[j])).to(layout.dtype).double()
        later = order[step + 1 :]
        W[later] -= torch.outer(inverse[later, j], (W[j] - value) / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_rtn_is_the_nearest_point_of_the_best_grid(
    layer: MakeLayer, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    case = layer(members=24, d_out=5, dtype=dtype)
    layout = Layout(8, symmetric, dtype)
    W = case.dense.double().T
    scale, zero = best_grids(W, bits, layout, None)
    (found,) = quantised(RtnPruner(group=8, symmetric=symmetric), case, [bits])
    torch.testing.assert_close(found.scale.double().repeat_interleave(8, 1), scale.T, rtol=1e-6, atol=0)
    assert torch.equal(found.zero.double().repeat_interleave(8, 1), zero.T)
    expected = (scale * (nearest(W, scale, zero, bits) - zero)).to(dtype).double().T
    error = (found.weight.double() - W.T).abs()
    # of two codes at equal distance, either
    torch.testing.assert_close(error, (expected - W.T).abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation_order", [True, False], ids=["by activation", "as they come"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [16, 20, 40, 80])
def test_gptq_is_the_textbook_one(layer: MakeLayer, group: int, symmetric: bool, activation_order: bool) -> None:
    """More inputs than one piece and, with blocks of 48, than one block; groups smaller and larger than both."""
    case = layer(members=80, tokens=200, shift=0.5, dead=(3, 40))
    pruner = GptqPruner(group=group, symmetric=symmetric, activation_order=activation_order, damping=0.02, block=48)
    for bits, found in zip([8, 4, 3, 2], quantised(pruner, case, [8, 4, 3, 2]), strict=True):
        expected = textbook(case, bits, Layout(group, symmetric, torch.float32), 0.02, activation_order)
        assert same(found.codes.T, expected) >= 0.99


def test_gptq_compensates_what_is_stored_in_bfloat16(layer: MakeLayer) -> None:
    case = layer(members=40, dtype=torch.bfloat16)
    for bits, found in zip([8, 3], quantised(GptqPruner(group=8), case, [8, 3]), strict=True):
        assert same(found.codes.T, textbook(case, bits, Layout(8, False, torch.bfloat16), 0.01, True)) >= 0.99


@pytest.mark.parametrize("activation_order", [True, False])
def test_widths_together_are_those_one_at_a_time(layer: MakeLayer, activation_order: bool) -> None:
    case = layer(members=96, tokens=300)
    pruner = GptqPruner(group=32, activation_order=activation_order)
    for bits, found in zip(WIDTHS, quantised(pruner, case), strict=True):
        (alone,) = quantised(pruner, case, [bits])
        assert alone.bits == found.bits == bits
        assert same(found.codes, alone.codes) >= 0.999
        torch.testing.assert_close(found.scale, alone.scale)


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("block", [1, 24, 33, 1000])
def test_blocks_do_not_change_what_is_computed(layer: MakeLayer, block: int, activation_order: bool) -> None:
    case = layer(members=96, tokens=300)
    pruner = GptqPruner(group=32, activation_order=activation_order)
    for usual, found in zip(quantised(pruner, case), quantised(replace(pruner, block=block), case), strict=True):
        assert same(found.codes, usual.codes) >= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_is_better_than_rtn(layer: MakeLayer, activation_order: bool, symmetric: bool, dtype: torch.dtype) -> None:
    case = layer(members=96, d_out=32, tokens=400, dtype=dtype)
    gptq = quantised(GptqPruner(group=32, symmetric=symmetric, activation_order=activation_order), case)
    for ours, plain in zip(gptq, quantised(RtnPruner(group=32, symmetric=symmetric), case), strict=True):
        assert error_of(case, ours) < error_of(case, plain)


def test_gptq_fits_another_target(layer: MakeLayer) -> None:
    """At 8 bits it comes close to the least-squares optimum, which the dense weight is far from."""
    case = layer(members=24, shift=3.0)
    (found,) = quantised(GptqPruner(damping=1e-4), case, [8])
    every = torch.arange(24)
    assert error_of(case, found) < 1.01 * case.least_error(every) < 0.95 * case.error(every, case.dense)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shrunk_ranges_are_better_than_full_ones(layer: MakeLayer, bits: int, symmetric: bool) -> None:
    """With an importance, too; never worse in any group, as the full range is one of those tried."""
    W = layer(members=128, d_out=64).dense.T.contiguous()
    cost = torch.linspace(0.1, 2.0, 128)

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.repeat_interleave(64, 0), zero.repeat_interleave(64, 0)
        error = scale * (nearest(W, scale, zero, bits) - zero) - W
        return (cost[:, None] * error.square()).view(2, 64, 64).sum(1)

    found = grids(W, bits, Layout(64, symmetric, torch.float32), cost)
    low, high = W.view(2, 64, 64).amin(1).clamp_max(0), W.view(2, 64, 64).amax(1).clamp_min(0)
    scale = (2 * torch.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    shrunk, full = loss(found.scale, found.zero), loss(scale, zero)
    assert (shrunk <= full * (1 + 1e-5)).all()
    assert shrunk.sum() < 0.97 * full.sum()


def test_prunables_follow_the_settings() -> None:
    part = SimpleNamespace(
        name="mlp", stages=(("down",),), weight=lambda layer: torch.zeros(4, 48, dtype=torch.bfloat16)
    )
    for pruner in (RtnPruner(bits=[4, 3], group=32), GptqPruner(bits=[4, 3], group=32)):
        (unit,) = pruner.prunables([part])  # type: ignore[list-item]
        assert unit.name == "mlp.down"
        assert unit.choices is not None
        assert [level.kept for level in unit.choices] == [16, 4, 3]


def test_statistics() -> None:
    assert RtnPruner().statistics(torch.zeros(3, 5), 1) is None
    problem = GptqPruner().statistics(torch.zeros(3, 5), 1)
    assert isinstance(problem, LeastSquares)
    assert problem.moment.shape == (5, 3)


@pytest.mark.parametrize("kind", [RtnPruner, GptqPruner])
class TestSettings:
    def test_widths_of_the_configuration_become_a_tuple(self, kind: Any) -> None:
        pruner = kind(bits=OmegaConf.create([8, 4]))
        assert pruner.bits == (8, 4)
        assert type(pruner.bits) is tuple
        assert hash(pruner) == hash(kind(bits=(8, 4)))

    @pytest.mark.parametrize("bits", [[], [1], [4, 9], [4.5], ["4"], "48", 4, None, [True]], ids=str)
    def test_impossible_widths_are_refused(self, kind: Any, bits: Any) -> None:
        with pytest.raises(
            InputError, match=r"^prune\.pruner\.bits=.* must be a list of whole widths from 2 to 8, such as"
        ):
            kind(bits=bits)

    def test_impossible_groups_are_refused(self, kind: Any) -> None:
        with pytest.raises(
            InputError, match=r"^prune\.pruner\.group=0 must be at least 1 input; 128 is the usual choice$"
        ):
            kind(group=0)


@pytest.mark.parametrize(
    "settings", [*({"damping": x} for x in (0.0, -1.0, math.nan, math.inf)), {"block": 0}], ids=str
)
def test_impossible_settings_of_gptq_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^prune\.pruner\.(damping|block)=.* must be .*is the usual choice$"):
        GptqPruner(**settings)


@pytest.mark.parametrize("activation_order", [True, False])
def test_singular_problems_are_damped_until_they_are_solved(
    layer: MakeLayer, activation_order: bool, caplog: pytest.LogCaptureFixture
) -> None:
    case = layer(members=72, tokens=10)
    with caplog.at_level(logging.WARNING):
        (found,) = quantised(GptqPruner(group=24, activation_order=activation_order, damping=1e-7), case, [4])
    assert any("damping raised from 1e-07" in record.getMessage() for record in caplog.records)
    assert error_of(case, found) < 0.05


def test_activations_that_are_not_finite_are_refused(layer: MakeLayer) -> None:
    case = layer()
    case.problem.add(torch.full((1, 24), torch.inf), torch.zeros(1, 6))
    with pytest.raises(InputError, match="^unit: activations are not finite"):
        quantised(GptqPruner(), case)


# What every quantiser keeps to: add new ones to this list.
QUANTISERS: dict[str, Pruner] = {
    "rtn": RtnPruner(),
    "rtn symmetric": RtnPruner(symmetric=True),
    "gptq": GptqPruner(),
    "gptq symmetric": GptqPruner(symmetric=True),
    "gptq as inputs come": GptqPruner(activation_order=False),
    "gptq in groups of 20": GptqPruner(group=20, activation_order=False, block=8),
    "gptq alone": GptqPruner(group=1),
}
LAYERS: dict[str, dict[str, Any]] = {
    "some groups": {"members": 160, "tokens": 400},
    "groups that do not divide": {"members": 70},
    "another target": {"shift": 3.0},
    "dead inputs": {"dead": (0, 5, 6, 23)},
    "fewer tokens than inputs": {"members": 60, "tokens": 25},
    "one token": {"tokens": 1},
    "all inputs dead": {"dead": tuple(range(24))},
    "one input": {"members": 1},
    "half precision": {"dtype": torch.float16},
    "constant outputs": {"constant": 0.37},
    "zero outputs": {"constant": 0.0},
    "tiny outputs": {"constant": 1e-6, "dtype": torch.float16},
}


def case_of(layer: MakeLayer, constant: float | None = None, **settings: Any) -> Any:
    """A layer, two of whose outputs have the same weight everywhere if that is given."""
    case = layer(**settings)
    if constant is None:
        return case
    case.dense[:2] = constant
    case.problem.target_own_output(case.dense.T)
    return replace(case, T=case.X @ case.dense.double().T)


LOOKING = {name: pruner for name, pruner in QUANTISERS.items() if isinstance(pruner, GptqPruner)}
WITH_OUTPUT = {name: given for name, given in LAYERS.items() if name != "all inputs dead"}
WITH_CHOICE = {name: given for name, given in WITH_OUTPUT.items() if name not in ("one token", "one input")}
WITH_DEAD = {name: given for name, given in LAYERS.items() if "dead" in given}
WITH_ZEROS = {name: given for name, given in LAYERS.items() if given.get("constant") == 0.0}


@pytest.fixture(scope="module", params=QUANTISERS.values(), ids=QUANTISERS)
def pruner(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.sampled
class TestEveryQuantiser:
    @pytest.fixture(scope="module", params=LAYERS.values(), ids=LAYERS)
    @staticmethod
    def case(request: pytest.FixtureRequest, layer: MakeLayer) -> Any:
        return case_of(layer, **request.param)

    @pytest.fixture(scope="module")
    @staticmethod
    def candidates(pruner: Any, case: Any) -> list[Quantised]:
        """Of a pruner and a case, made once for all tests. Not to be changed."""
        return quantised(pruner, case)

    def test_every_width_is_what_was_asked_for(self, pruner: Any, case: Any, candidates: list[Quantised]) -> None:
        d_out, d_in = case.dense.shape
        groups = d_in // max(size for size in range(1, min(d_in, pruner.group) + 1) if d_in % size == 0)
        assert [candidate.bits for candidate in candidates] == WIDTHS
        for candidate in candidates:
            assert candidate.codes.dtype == candidate.zero.dtype == torch.uint8
            assert candidate.scale.dtype == candidate.weight.dtype == case.dense.dtype
            assert candidate.codes.shape == (d_out, d_in)
            assert candidate.scale.shape == candidate.zero.shape == (d_out, groups)
            assert all(x.is_contiguous() for x in (candidate.codes, candidate.scale, candidate.zero))
            assert int(candidate.codes.max()) < 2**candidate.bits
            assert int(candidate.zero.max()) < 2**candidate.bits
            assert (candidate.scale > 0).all()
            assert candidate.scale.isfinite().all()
            assert candidate.weight.isfinite().all()
            if pruner.symmetric:
                assert (candidate.zero == 2 ** (candidate.bits - 1)).all()

    def test_transposed_weights_give_the_same(self, pruner: Any, case: Any, candidates: list[Quantised]) -> None:
        """As those of GPT-2 are."""
        transposed = replace(case, dense=case.dense.T.contiguous().T)
        for plain, other in zip(candidates, quantised(pruner, transposed), strict=True):
            assert same(plain.codes, other.codes) >= 0.99
            assert all(x.is_contiguous() for x in (other.codes, other.scale, other.zero))

    @pytest.mark.parametrize("case", WITH_OUTPUT.values(), ids=WITH_OUTPUT, indirect=True)
    def test_eight_bits_are_nearly_dense(self, pruner: Any, case: Any, candidates: list[Quantised]) -> None:
        every = torch.arange(case.dense.shape[1])
        assert error_of(case, candidates[0]) <= case.error(every, case.dense) * 1.001 + 2e-4

    @pytest.mark.parametrize("case", WITH_CHOICE.values(), ids=WITH_CHOICE, indirect=True)
    def test_errors_rise_as_widths_fall(self, case: Any, candidates: list[Quantised]) -> None:
        errors = [error_of(case, candidate) for candidate in candidates]
        assert all(more >= less * 0.98 - 1e-6 for less, more in zip(errors, errors[1:], strict=False))
        assert errors[-1] < 1.0

    def test_runs_are_alike_and_leave_their_inputs_alone(
        self, pruner: Any, case: Any, candidates: list[Quantised]
    ) -> None:
        before = case.problem.upper.clone(), case.problem.moment.clone(), case.dense.clone()
        for first, second in zip(candidates, quantised(pruner, case), strict=True):
            assert torch.equal(first.codes, second.codes)
            assert torch.equal(first.scale, second.scale)
            assert torch.equal(first.zero, second.zero)
        after = case.problem.upper, case.problem.moment, case.dense
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @pytest.mark.parametrize("pruner", LOOKING.values(), ids=LOOKING, indirect=True)
    @pytest.mark.parametrize("case", WITH_DEAD.values(), ids=WITH_DEAD, indirect=True)
    def test_weights_of_dead_inputs_are_zero(self, case: Any, candidates: list[Quantised]) -> None:
        dead = case.X.abs().sum(0) == 0
        assert dead.any() and case.dense[:, dead].all()
        for candidate in candidates:
            assert not candidate.weight[:, dead].any()
            zero = candidate.zero.repeat_interleave(case.dense.shape[1] // candidate.zero.shape[1], 1)
            assert torch.equal(candidate.codes[:, dead], zero[:, dead])

    @pytest.mark.parametrize("case", WITH_ZEROS.values(), ids=WITH_ZEROS, indirect=True)
    def test_outputs_that_are_zero_stay_zero(self, case: Any, candidates: list[Quantised]) -> None:
        none = ~case.dense.any(1)
        assert none.any() and not none.all()
        for candidate in candidates:
            assert not candidate.weight[none].any()

    def test_no_widths_give_no_candidates(self, pruner: Any, layer: MakeLayer) -> None:
        assert pruner.candidates(task_of(layer()), []) == []

    def test_weights_that_are_not_finite_are_refused(self, pruner: Any, layer: MakeLayer) -> None:
        case = layer()
        case.dense[1, 2] = torch.nan
        with pytest.raises(
            InputError, match="^unit: weights are not finite; check the model's weights, or use dtype=float32$"
        ):
            pruner.candidates(task_of(case), [4])
