"""Removal and refit against brute force in float64, and what every pruner must keep to."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from local_prune.methods import obs as structured
from local_prune.methods.obs import REMOVALS, ObsPruner, _order_of_groups, removal_order, solve_levels
from local_prune.pruner import Pruner
from supernet.candidates import Members, member_columns
from supernet.errors import InputError

MakeLayer = Callable[..., Any]
DAMPING = 0.01


def normal_equations(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.T @ A, A.T @ B


def brute_force_order(A: Tensor, B: Tensor, width: int, count: int, first_order: float) -> list[int]:
    """Greedy removal that refits for every removal that is possible, by least squares on the data themselves.

    The score of a group P is the increase of 1/2 ||A W - B||^2 plus `first_order` times |sum(W_P * G_P)| before its
    removal.
    """
    moment = A.T @ B
    left = list(range(A.shape[1] // width))
    order: list[int] = []

    def solve(groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        columns = torch.stack([member_columns(torch.tensor(g, dtype=torch.int64), width) for g in groups])
        data = A[:, columns].movedim(1, 0)  # (problems, rows, columns)
        weight = torch.linalg.lstsq(data, B.expand(len(groups), *B.shape)).solution
        return weight, 0.5 * (data @ weight - B).square().sum((1, 2))

    for _ in range(count):
        weight, loss = solve([left])
        rest = [[g for g in left if g != group] for group in left]
        increase = solve(rest)[1] - loss if len(left) > 1 else torch.zeros(1)
        energy = (weight[0] * moment[member_columns(torch.tensor(left), width)]).reshape(len(left), -1).sum(1)
        order.append(left.pop(int((increase + first_order * energy.abs()).argmin())))
    return order


# The width, and how many groups: more than one and more than two blocks of removals for single rows.
SHAPES = [
    pytest.param(1, 12, id="rows"),
    pytest.param(1, REMOVALS + 9, id="rows in two blocks"),
    pytest.param(1, 2 * REMOVALS + 5, id="rows in three blocks"),
    pytest.param(2, 12, id="pairs"),
    pytest.param(5, 7, id="groups of five"),
]


@pytest.mark.sampled
@pytest.mark.parametrize("first_order", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("width", "groups"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 2.0], ids=["own output", "another target"])
def test_removal_is_the_greedy_one(layer: MakeLayer, width: int, groups: int, first_order: float, shift: float) -> None:
    A, B = layer(members=groups, width=width, tokens=2 * groups * width, shift=shift).augmented(DAMPING)
    H, G = normal_equations(A, B)
    order = removal_order(H.inverse(), G, width, groups, first_order)
    assert order.tolist() == brute_force_order(A, B, width, groups, first_order)


@pytest.mark.parametrize("first_order", [0.0, 1.0])
def test_rows_go_in_the_order_of_groups_of_one(layer: MakeLayer, first_order: float) -> None:
    count = 2 * REMOVALS + 6
    H, G = normal_equations(*layer(members=count, tokens=150, shift=1.0).augmented(DAMPING))
    inverse = H.inverse()
    rows = removal_order(inverse, G, 1, count, first_order)
    groups = _order_of_groups(inverse, inverse @ G, G, 1, count, first_order)
    assert rows.tolist() == groups.tolist()


@pytest.mark.parametrize("width", [1, 3])
def test_few_removals_begin_like_many(layer: MakeLayer, width: int) -> None:
    H, G = normal_equations(*layer(members=45, width=width, tokens=300).augmented(DAMPING))
    every = removal_order(H.inverse(), G, width, 45).tolist()
    assert sorted(every) == list(range(45))
    for count in (0, 1, REMOVALS, REMOVALS + 1):
        assert removal_order(H.inverse(), G, width, count).tolist() == every[:count]


def test_float32_goes_as_far_as_float64_on_an_ill_conditioned_problem(layer: MakeLayer) -> None:
    """Rounding may swap rows that are worth the same, but what is lost in the end stays the same."""
    generator = torch.Generator().manual_seed(0)
    d_in, d_out = 256, 32
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)).Q
    H = basis @ torch.diag(torch.logspace(0, -6, d_in, dtype=torch.float64)) @ basis.T
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    G = H @ torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    exact = removal_order(H.inverse(), G, 1, 240)
    rounded = removal_order(H.inverse().float(), G.float(), 1, 240)

    def loss(removed: Tensor) -> float:
        kept = torch.ones(d_in, dtype=torch.bool).index_fill(0, removed, False)
        energy = (G * torch.linalg.solve(H, G)).sum()
        return float(energy - (G[kept] * torch.linalg.solve(H[kept][:, kept], G[kept])).sum())

    for count in range(40, 241, 40):
        assert loss(rounded[:count]) <= 1.01 * loss(exact[:count])


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("kept", [(9, 6, 3, 1, 0), (12, 5), (2, 7), (0,), (4, 4)], ids=str)
def test_levels_are_the_least_squares_optimum(layer: MakeLayer, width: int, kept: tuple[int, ...]) -> None:
    A, B = layer(members=12, width=width, shift=1.0).augmented(DAMPING)
    H, G = normal_equations(A, B)
    order = removal_order(H.inverse(), G, width, 12 - min(kept))
    levels = solve_levels(H, G, order, list(kept), width)
    assert len(levels) == len(kept)
    for count, (members, weight) in zip(kept, levels, strict=True):
        removed = set(order[: 12 - count].tolist())
        assert members.tolist() == [m for m in range(12) if m not in removed]
        expected = torch.linalg.lstsq(A[:, member_columns(members, width)], B).solution
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_impossible_damping_is_refused(value: float) -> None:
    with pytest.raises(
        InputError, match=rf"^prune\.pruner\.damping={value} must be finite and above 0; 0\.01 is the usual"
    ):
        ObsPruner(damping=value)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_an_impossible_first_order_term_is_refused(value: float) -> None:
    with pytest.raises(
        InputError, match=rf"^prune\.pruner\.first_order={value} must be finite and not below 0; 0 is the usual"
    ):
        ObsPruner(first_order=value)


@pytest.mark.parametrize("width", [1, 3])
def test_transposed_weights_give_the_same(layer: MakeLayer, width: int) -> None:
    """As those of GPT-2 are."""
    case = layer(members=12, width=width)
    transposed = replace(case.task, dense=case.dense.T.contiguous().T)
    for plain, other in zip(*(ObsPruner().candidates(task, [9, 4]) for task in (case.task, transposed)), strict=True):
        assert torch.equal(plain.kept, other.kept)
        torch.testing.assert_close(plain.weight, other.weight)


@pytest.mark.parametrize("width", [1, 3])
def test_singular_problems_are_damped_until_they_are_solved(
    layer: MakeLayer, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = layer(members=72 // width, width=width, tokens=10)
    with caplog.at_level(logging.WARNING):
        candidates = ObsPruner(damping=1e-7).candidates(case.task, [60 // width, 6])
    assert any("damping raised from 1e-07" in record.getMessage() for record in caplog.records)
    for candidate in candidates:
        assert candidate.weight.isfinite().all()
        assert case.error_of(candidate) <= 1.0


@pytest.mark.parametrize("failures", [1, 3])
def test_a_failure_behind_the_first_factorisation_raises_the_damping(
    layer: MakeLayer, failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def fail(hessian: torch.Tensor, *given: Any) -> Any:
        seen.append(float(hessian.diagonal().sum()))
        if len(seen) <= failures:
            raise torch.linalg.LinAlgError("singular")
        return solve_levels(hessian, *given)

    monkeypatch.setattr(structured, "solve_levels", fail)
    case = layer()
    (found,) = ObsPruner(damping=1e-4).candidates(case.task, [12])
    monkeypatch.undo()
    (expected,) = ObsPruner(damping=1e-4 * 10.0**failures).candidates(case.task, [12])
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * failures


@pytest.mark.parametrize("width", [1, 3])
def test_candidates_solve_the_damped_problem(layer: MakeLayer, width: int) -> None:
    case = layer(members=12, width=width, shift=1.0)
    A, B = case.augmented(0.05)
    for candidate in ObsPruner(damping=0.05).candidates(case.task, [9, 4, 1]):
        expected = torch.linalg.lstsq(A[:, member_columns(candidate.kept, width)], B).solution
        torch.testing.assert_close(candidate.weight.double(), expected.T, rtol=1e-3, atol=1e-4)


# What every structured pruner keeps to that refits: add new ones to this list.
PRUNERS: dict[str, Pruner] = {
    "obs": ObsPruner(),
    "obs with the first-order term": ObsPruner(first_order=1.0),
}
LAYERS: dict[str, dict[str, Any]] = {
    "neurons": {"members": 70, "tokens": 400},
    "heads": {"members": 9, "width": 8},
    "another target": {"shift": 3.0},
    "dead inputs": {"dead": (0, 5, 6, 23)},
    "dead heads": {"members": 6, "width": 4, "dead": (4, 5, 6, 7, 20)},
    "fewer tokens than inputs": {"members": 60, "tokens": 25},
    "one token": {"tokens": 1},
    "all inputs dead": {"dead": tuple(range(24))},
    "one member": {"members": 1, "width": 5},
}


WITH_MEMBERS = {name: given for name, given in LAYERS.items() if name != "one member"}
WITH_OUTPUT = {name: given for name, given in LAYERS.items() if name != "all inputs dead"}
WITH_DEAD = {name: given for name, given in LAYERS.items() if "dead" in given}


@pytest.fixture(scope="module", params=PRUNERS.values(), ids=PRUNERS)
def pruner(request: pytest.FixtureRequest) -> Any:
    return request.param


def levels_of(members: int) -> list[int]:
    """Falling, with a step of one member at the beginning, and ending in none."""
    return sorted({max(0, members - 1), *(members * i // 8 for i in range(8))}, reverse=True)


class TestEveryPruner:
    @pytest.fixture(scope="module", params=LAYERS.values(), ids=LAYERS)
    @staticmethod
    def case(request: pytest.FixtureRequest, layer: MakeLayer) -> Any:
        return layer(**request.param)

    @pytest.fixture(scope="module")
    @staticmethod
    def candidates(pruner: Pruner, case: Any) -> list[Members]:
        """Of a pruner and a case, made once for all tests. Not to be changed."""
        return pruner.candidates(case.task, levels_of(case.members))

    def test_every_level_keeps_what_was_asked_for(self, case: Any, candidates: list[Members]) -> None:
        assert [len(candidate.kept) for candidate in candidates] == levels_of(case.members)
        for candidate in candidates:
            assert candidate.kept.dtype == torch.int64
            assert candidate.kept.tolist() == sorted({int(m) for m in candidate.kept if 0 <= m < case.members})
            assert candidate.weight.shape == (len(case.dense), len(candidate.kept) * case.width)
            assert candidate.weight.isfinite().all()

    @pytest.mark.parametrize("case", WITH_MEMBERS.values(), ids=WITH_MEMBERS, indirect=True)
    def test_levels_are_nested(self, candidates: list[Members]) -> None:
        for more, fewer in zip(candidates, candidates[1:], strict=False):
            assert set(fewer.kept.tolist()) <= set(more.kept.tolist())

    @pytest.mark.parametrize("case", WITH_OUTPUT.values(), ids=WITH_OUTPUT, indirect=True)
    def test_errors_rise_from_level_to_level(self, case: Any, candidates: list[Members]) -> None:
        errors = [case.error_of(candidate) for candidate in candidates]
        for less, more in zip(errors, errors[1:], strict=False):
            assert more >= less * (1 - 1e-3) - 1e-6
        assert errors[-1] == pytest.approx(1.0)  # nothing kept

    @pytest.mark.parametrize("case", WITH_OUTPUT.values(), ids=WITH_OUTPUT, indirect=True)
    def test_errors_lie_between_the_optimum_and_no_refit(self, case: Any, candidates: list[Members]) -> None:
        for candidate in candidates:
            error = case.error_of(candidate)
            columns = member_columns(candidate.kept, case.width)
            assert error >= case.least_error(candidate.kept) * (1 - 1e-3) - 1e-9
            assert error <= case.error(columns, case.dense[:, columns]) * (1 + 1e-3) + 1e-9

    @pytest.mark.parametrize("case", WITH_DEAD.values(), ids=WITH_DEAD, indirect=True)
    def test_dead_inputs_get_no_weight_and_go_first(self, case: Any, candidates: list[Members]) -> None:
        dead = case.X.abs().sum(0) == 0
        assert dead.any() and case.dense[:, dead].all()
        for candidate in candidates:
            columns = member_columns(candidate.kept, case.width)
            assert not candidate.weight[:, dead[columns]].any()
            dead_members = dead.view(-1, case.width).all(1)
            if len(candidate.kept) <= int((~dead_members).sum()):
                assert not dead_members[candidate.kept].any()

    def test_runs_are_alike_and_leave_the_problem_alone(
        self, pruner: Pruner, case: Any, candidates: list[Members]
    ) -> None:
        before = case.problem.upper.clone(), case.problem.moment.clone(), case.dense.clone()
        again = pruner.candidates(case.task, levels_of(case.members))
        for first, second in zip(candidates, again, strict=True):
            assert torch.equal(first.kept, second.kept)
            assert torch.equal(first.weight, second.weight)
        after = case.problem.upper, case.problem.moment, case.dense
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_weights_have_the_dtype_of_the_dense_one(
        self, pruner: Pruner, layer: MakeLayer, dtype: torch.dtype
    ) -> None:
        case = layer(dtype=dtype)
        for candidate in pruner.candidates(case.task, [16, 8]):
            assert candidate.weight.dtype == dtype
            assert candidate.weight.is_contiguous()
            assert case.error_of(candidate) <= case.least_error(candidate.kept) * 1.1

    def test_no_levels_give_no_candidates(self, pruner: Pruner, layer: MakeLayer) -> None:
        case = layer()
        assert pruner.candidates(case.task, []) == []

    def test_the_choice_is_better_than_chance(self, pruner: Pruner, layer: MakeLayer) -> None:
        case = layer(members=40, tokens=400)
        (candidate,) = pruner.candidates(case.task, [20])
        generator = torch.Generator().manual_seed(1)
        chance = [case.least_error(torch.randperm(40, generator=generator)[:20]) for _ in range(200)]
        assert case.error_of(candidate) < min(chance)
