"""Sums over batches equal the whole in float64, and the damped problem is positive definite or says why not."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from local_prune.statistics import PANELS, Damped, LeastSquares, Moments, add_gram, damped, solved, symmetric
from supernet.errors import InputError

MakeLayer = Callable[..., Any]


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 3 * PANELS + 1), batches=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_gram_by_panels_is_the_gram(d: int, batches: list[int]) -> None:
    generator = torch.Generator().manual_seed(d)
    X = torch.randint(-9, 9, (sum(batches), d), generator=generator).float()  # exact in float32
    gram = torch.zeros(d, d)
    for part in X.split(batches):
        add_gram(gram, part)
    assert torch.equal(symmetric(gram), X.T @ X)


def test_symmetric_reads_the_upper_triangle_alone() -> None:
    upper = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 4.0, 5.0], [torch.nan, torch.nan, 6.0]])
    expected = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert torch.equal(symmetric(upper), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_add_up(layer: MakeLayer, dtype: torch.dtype) -> None:
    case = layer(tokens=100, shift=1.0)
    X, T = case.X.to(dtype), case.T.to(dtype)
    problem = LeastSquares.zeros(X.shape[1], T.shape[1])
    for start in range(0, 100, 33):
        problem.add(X[start : start + 33], T[start : start + 33])
    X, T = X.double(), T.double()
    torch.testing.assert_close(problem.hessian.double(), X.T @ X, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(problem.moment.double(), X.T @ T, rtol=1e-5, atol=1e-4)
    assert problem.energy == pytest.approx(float(T.square().sum()), rel=1e-5)
    assert problem.tokens == 100
    assert problem.hessian.dtype == problem.moment.dtype == torch.float32


def test_the_own_output_needs_no_pass_over_the_tokens(layer: MakeLayer) -> None:
    case = layer()
    short = LeastSquares.zeros(*case.dense.T.shape)
    short.add(case.X)
    short.target_own_output(case.dense.T)
    torch.testing.assert_close(short.hessian, case.problem.hessian)
    torch.testing.assert_close(short.moment, case.problem.moment, rtol=1e-4, atol=1e-3)
    assert short.energy == pytest.approx(case.problem.energy, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_errors_are_those_of_the_outputs(layer: MakeLayer, shift: float) -> None:
    case = layer(shift=shift)
    generator = torch.Generator().manual_seed(0)
    kept = [torch.tensor([0, 3, 4, 20]), torch.arange(24), torch.empty(0, dtype=torch.int64)]
    levels = [(k, torch.randn(len(k), len(case.dense), generator=generator)) for k in kept]
    expected = [case.error(k, weight.T) for k, weight in levels]
    assert case.problem.errors(levels) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] == 1.0


def test_errors_are_never_negative_nor_undefined(layer: MakeLayer) -> None:
    case = layer()
    (error,) = case.problem.errors([(torch.arange(24), case.dense.T)])
    assert 0.0 <= error < 1e-5
    nothing = LeastSquares.zeros(3, 2)
    nothing.add(torch.zeros(4, 3), torch.zeros(4, 2))
    assert nothing.errors([(torch.tensor([0]), torch.zeros(1, 2))]) == [0.0]


@pytest.mark.parametrize("dead", [(), (0, 7)])
def test_damping_is_a_ridge_towards_the_dense_weight(layer: MakeLayer, dead: tuple[int, ...]) -> None:
    case = layer(shift=1.0, dead=dead)
    A, B = case.augmented(0.1)
    solved = damped(case.problem, case.dense.T, 0.1, "unit")
    torch.testing.assert_close(solved.hessian.double(), A.T @ A, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(solved.moment.double(), A.T @ B, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(solved.inverse @ solved.hessian, torch.eye(24), rtol=1e-3, atol=1e-3)
    weight = solved.inverse @ solved.moment
    assert not weight[list(dead)].any()  # zero, not the dense weight
    assert weight.abs().max() > 0


def test_nothing_but_dead_inputs_still_has_a_solution() -> None:
    problem = LeastSquares.zeros(3, 2)
    solved = damped(problem, torch.ones(3, 2), 0.01, "unit")
    assert torch.equal(solved.inverse @ solved.moment, torch.zeros(3, 2))


def indefinite(off_diagonal: float) -> LeastSquares:
    """As rounding may leave a Hessian: with eigenvalues 1 + off_diagonal and 1 - off_diagonal."""
    return LeastSquares(torch.tensor([[1.0, off_diagonal], [0.0, 1.0]]), torch.ones(2, 1), torch.ones(1), 1)


def test_damping_is_raised_with_a_warning_where_cholesky_fails(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        solved = damped(indefinite(1.5), torch.ones(2, 1), 0.01, "model.layers.3.mlp")
    assert [record.getMessage() for record in caplog.records] == [
        "model.layers.3.mlp: Cholesky failed; damping raised from 0.01 to 1"
    ]
    torch.testing.assert_close(solved.hessian, torch.tensor([[2.0, 1.5], [1.5, 2.0]]))
    torch.testing.assert_close(solved.moment, torch.full((2, 1), 2.0))


def test_what_works_at_once_gives_no_warning(layer: MakeLayer, caplog: pytest.LogCaptureFixture) -> None:
    case = layer()
    damped(case.problem, case.dense.T, 0.01, "unit")
    assert not caplog.records


def test_damping_is_not_raised_for_ever() -> None:
    with pytest.raises(
        InputError, match=r"model\.layers\.3\.mlp: the Hessian is not positive definite even with damping 1000"
    ):
        damped(indefinite(1e9), torch.ones(2, 1), 0.01, "model.layers.3.mlp")


def test_what_fails_behind_the_first_factorisation_gets_more_damping(
    layer: MakeLayer, caplog: pytest.LogCaptureFixture
) -> None:
    case = layer()
    ridges = []

    def solve(problem: Damped) -> float:
        ridges.append(problem.factor.ridge)
        if len(ridges) < 3:
            raise torch.linalg.LinAlgError("singular")  # type: ignore[attr-defined]
        return problem.factor.ridge

    with caplog.at_level(logging.WARNING):
        found = solved(case.problem, case.dense.T, 0.01, "unit", solve)
    first = 0.01 * float(case.problem.hessian.diagonal().mean())
    assert ridges == pytest.approx([first, 10 * first, 100 * first]) and found == ridges[-1]
    assert [record.getMessage() for record in caplog.records] == [
        f"unit: Cholesky failed; damping raised from 0.01 to {to}" for to in ("0.1", "1")
    ]
    assert case.problem.factor(0.01, "another").ridge == found  # layers with the same inputs begin where this one ended


def test_what_fails_with_any_damping_is_told(layer: MakeLayer) -> None:
    case, calls = layer(), []

    def fail(problem: Damped) -> None:
        calls.append(problem)
        raise torch.linalg.LinAlgError("singular")  # type: ignore[attr-defined]

    with pytest.raises(
        InputError, match="^unit: the Hessian is not positive definite even with damping 1000; use more"
    ):
        solved(case.problem, case.dense.T, 0.01, "unit", fail)
    assert len(calls) == 6


def spoil_inputs(X: Tensor, T: Tensor) -> None:
    X[3, 1] = torch.nan


def overflow_inputs(X: Tensor, T: Tensor) -> None:
    X[3, 1] = 1e30  # its square is not finite in float32


def spoil_target(X: Tensor, T: Tensor) -> None:
    T[0, 0] = torch.inf


@pytest.mark.parametrize("spoil", [spoil_inputs, overflow_inputs, spoil_target])
def test_activations_that_are_not_finite_are_told_with_their_unit(layer: MakeLayer, spoil: Callable[..., None]) -> None:
    case = layer()
    X, T = case.X.clone(), case.T.clone()
    spoil(X, T)
    problem = LeastSquares.zeros(*case.dense.T.shape)
    problem.add(X, T)
    with pytest.raises(InputError, match=re.escape("model.layers.3.mlp: activations are not finite")):
        damped(problem, case.dense.T, 0.01, "model.layers.3.mlp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_each_input(layer: MakeLayer, dtype: torch.dtype) -> None:
    X = layer(tokens=100, dead=(3,)).X.to(dtype)
    sums = Moments.zeros(X.shape[1])
    for part in X.split(33):
        sums.add(part)
    X = X.double()
    assert sums.tokens == 100
    for found, expected in (
        (sums.total, X.sum(0)),
        (sums.squares, X.square().sum(0)),
        (sums.absolute, X.abs().sum(0)),
        (sums.norms, X.norm(dim=0).float()),
        (sums.mean, X.mean(0).float()),
        (sums.variance, X.var(0, unbiased=False).float()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_small_variances_beside_large_means_are_not_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    X = 1000.0 + torch.randn(5000, 8, generator=generator)
    sums = Moments.zeros(8)
    for part in X.split(2000):
        sums.add(part)
    expected = X.double().var(0, unbiased=False)
    assert float(((sums.variance - expected) / expected).abs().max()) < 1e-5


def test_moments_of_nothing_and_of_constants_are_defined() -> None:
    sums = Moments.zeros(2)
    assert not sums.mean.any() and not sums.variance.any() and not sums.norms.any()
    sums.add(torch.full((50, 2), 0.1))
    torch.testing.assert_close(sums.mean, torch.full((2,), 0.1))
    assert bool((sums.variance >= 0.0).all()) and float(sums.variance.max()) < 1e-8


def test_some_of_the_outputs_are_a_problem_of_their_own(layer: MakeLayer) -> None:
    """That of one layer of several with the same inputs, which are factorised once."""
    case = layer(shift=1.0)
    alone = LeastSquares.zeros(case.X.shape[1], 2)
    alone.add(case.X, case.T[:, 2:4])
    first, second = case.problem.outputs(slice(0, 2)), case.problem.outputs(slice(2, 4))
    torch.testing.assert_close(second.moment, alone.moment, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(second.hessian, alone.hessian, rtol=1e-4, atol=1e-3)
    assert second.energy == pytest.approx(alone.energy)
    assert second.tokens == alone.tokens
    assert first.factor(0.01, "unit") is second.factor(0.01, "another")
    assert first.factor(0.02, "unit") is not second.factor(0.01, "unit")


@pytest.mark.parametrize("ordered", [False, True])
def test_the_upper_factor_gives_the_inverse_of_the_inputs_from_each_on(layer: MakeLayer, ordered: bool) -> None:
    case = layer()
    factor = case.problem.factor(0.05, "unit")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) if ordered else torch.arange(24)
    for other in (None, order.flip(0)):
        factor.upper_of_inverse(other)  # must not be taken for the one that is asked for
    U = factor.upper_of_inverse(order if ordered else None).double()
    assert torch.equal(U, U.triu())
    hessian = factor.hessian[order][:, order].double()
    for start in (0, 1, 11, 23):
        rest = U[start:, start:]
        torch.testing.assert_close(rest.T @ rest, hessian[start:, start:].inverse(), rtol=1e-3, atol=1e-6)


def test_the_solution_is_that_of_the_damped_problem(layer: MakeLayer) -> None:
    case = layer(shift=1.0)
    A, B = case.augmented(0.05)
    solved = damped(case.problem, case.dense.T, 0.05, "unit")
    torch.testing.assert_close(solved.solution.double(), torch.linalg.lstsq(A, B).solution, rtol=1e-3, atol=1e-4)
