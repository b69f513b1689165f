"""The KL divergence without stored logits is the one with them, in float64; the log-likelihood is the cross-entropy."""

import pytest
import torch
from torch import Tensor, nn

from search.fitness import CHUNK, Targets, kl_divergence, logits_of, negative_log_likelihood, targets
from supernet.architecture import Head

VOCABULARY, HIDDEN = 301, 16
TOKENS = 2 * CHUNK + 37  # whole chunks and a part of one


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(dtype: torch.dtype = torch.float32, bias: bool = False, cap: float | None = None) -> Head:
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    linear.weight.data = normal(VOCABULARY, HIDDEN, seed=1).to(dtype)
    if bias:
        linear.bias.data = normal(VOCABULARY, seed=2).to(dtype)
    return Head(linear.requires_grad_(False), cap)


def exact_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden.double() @ head.linear.weight.double().T
    if head.linear.bias is not None:
        logits = logits + head.linear.bias.double()
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def kl_by_definition(dense: Tensor, pruned: Tensor, head: Head) -> Tensor:
    p, q = (exact_logits(hidden, head).log_softmax(-1) for hidden in (dense, pruned))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("tokens", [1, CHUNK, TOKENS])
@pytest.mark.parametrize("distance", [0.03, 1.0, 10.0])
def test_kl_is_that_of_the_full_softmax(tokens: int, distance: float) -> None:
    head, dense = head_of(), normal(tokens, HIDDEN, seed=3)
    pruned = dense + normal(tokens, HIDDEN, seed=4, scale=distance)
    found = kl_divergence([pruned], head, targets(dense, head))[0]
    assert found.shape == (tokens,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kl_by_definition(dense, pruned, head), rtol=1e-3, atol=2e-5)


def test_a_bias_of_the_head_counts() -> None:
    head, dense = head_of(bias=True), normal(40, HIDDEN, seed=3)
    pruned = dense + normal(40, HIDDEN, seed=4)
    found = kl_divergence([pruned], head, targets(dense, head))[0]
    torch.testing.assert_close(found.double(), kl_by_definition(dense, pruned, head), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("distance", [0.03, 1.0, 10.0])
def test_kl_of_capped_logits_is_that_of_the_full_softmax(cap: float, bias: bool, distance: float) -> None:
    head, dense = head_of(bias=bias, cap=cap), normal(TOKENS, HIDDEN, seed=3)
    pruned = [dense + normal(TOKENS, HIDDEN, seed=seed, scale=distance) for seed in (4, 5)]
    found = kl_divergence(pruned, head, targets(dense, head))
    for one, student in zip(found, pruned, strict=True):
        torch.testing.assert_close(one.double(), kl_by_definition(dense, student, head), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 0.5, 5.0])
def test_logits_are_capped(cap: float | None) -> None:
    head, hidden = head_of(bias=True, cap=cap), normal(7, HIDDEN, seed=3)
    before = hidden.clone()
    logits = logits_of(hidden, head)
    torch.testing.assert_close(logits.double(), exact_logits(hidden, head), rtol=1e-4, atol=1e-5)
    assert cap is None or logits.abs().max() <= cap
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_dense_model_is_at_no_distance_from_itself(dtype: torch.dtype, scale: float, cap: float | None) -> None:
    head, dense = head_of(dtype, cap=cap), normal(TOKENS, HIDDEN, seed=3, scale=scale).to(dtype)
    assert kl_divergence([dense], head, targets(dense, head)).abs().max() <= 1e-5


def test_bfloat16_finds_the_mean_of_float64() -> None:
    head, dense = head_of(torch.bfloat16), normal(2_000, HIDDEN, seed=3).bfloat16()
    pruned = (dense + normal(2_000, HIDDEN, seed=4, scale=0.3)).bfloat16()
    found = kl_divergence([pruned], head, targets(dense, head))[0].double().mean()
    assert float(found) == pytest.approx(float(kl_by_definition(dense, pruned, head).mean()), rel=0.02)


def test_bfloat16_is_right_token_by_token_where_logits_are_large() -> None:
    """Logits of 50 are rounded to quarters in bfloat16: more than the divergence of a good candidate."""
    head, dense = head_of(torch.bfloat16), normal(TOKENS, HIDDEN, seed=3, scale=4.0).bfloat16()
    pruned = (dense + normal(TOKENS, HIDDEN, seed=4, scale=0.05)).bfloat16()
    found = kl_divergence([pruned], head, targets(dense, head))[0].double()
    error = (found - kl_by_definition(dense, pruned, head)).square().mean().sqrt()
    assert float(error) < 0.01
    assert float(found.min()) > -0.01


def test_models_measured_together_come_out_as_alone() -> None:
    head, dense = head_of(), normal(TOKENS, HIDDEN, seed=3)
    students = [dense + normal(TOKENS, HIDDEN, seed=seed) for seed in (4, 5)]
    together = kl_divergence(students, head, targets(dense, head))
    alone = [kl_divergence([student], head, targets(dense, head))[0] for student in students]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)


def test_large_logits_do_not_overflow() -> None:
    head, dense = head_of(), normal(5, HIDDEN, seed=3, scale=1e3)
    found = kl_divergence([-dense], head, targets(dense, head))[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), kl_by_definition(dense, -dense, head), rtol=1e-4, atol=1e-2)


def test_targets_of_parts_are_parts_of_targets() -> None:
    head, dense = head_of(), normal(TOKENS, HIDDEN, seed=3)
    whole = targets(dense, head)
    first, rest = targets(dense[:100], head), targets(dense[100:], head)
    torch.testing.assert_close(torch.cat([first.expected, rest.expected]), whole.expected)
    torch.testing.assert_close(Targets.join([first, rest]).normaliser, whole.normaliser, rtol=1e-4, atol=1e-4)
    moved = whole.to("cpu")
    assert isinstance(moved, Targets)
    assert torch.equal(moved.expected, whole.expected) and torch.equal(moved.normaliser, whole.normaliser)


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 7), (4, CHUNK)])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_negative_log_likelihood_is_cross_entropy(batch: int, length: int, cap: float | None) -> None:
    head, hidden = head_of(cap=cap), normal(batch, length, HIDDEN, seed=3)
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))
    found = negative_log_likelihood(hidden, head, ids)
    log_p = exact_logits(hidden, head).log_softmax(-1)
    expected = [[-log_p[b, t, ids[b, t + 1]] for t in range(length - 1)] for b in range(batch)]
    assert found.shape == (batch, length - 1)
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-4)
