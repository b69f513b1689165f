"""The KL divergence without stored logits is the one with them, in float64; the log-likelihood is the cross-entropy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from search.evaluation.fitness import (
    NO_LABEL,
    TILE,
    CrossEntropy,
    Fitness,
    KlDivergence,
    Targets,
    TopKDivergence,
    _raw_logits,
    cross_entropy,
    kl_divergence,
    logits_of,
    negative_log_likelihood,
    targets,
    token_slices,
    topk_divergence,
)
from supernet.errors import InputError
from supernet.models.forward import LmHead

VOCABULARY, HIDDEN = TILE + 301, 16  # a whole tile of the vocabulary and a part of one
CHUNK = 128  # tokens of one model
BYTES = 4 * TILE * CHUNK
TOKENS = 2 * CHUNK + 37  # whole chunks and a part of one


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(dtype: torch.dtype = torch.float32, bias: bool = False, cap: float | None = None) -> LmHead:
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    linear.weight.data = normal(VOCABULARY, HIDDEN, seed=1).to(dtype)
    if bias:
        linear.bias.data = normal(VOCABULARY, seed=2).to(dtype)
    return LmHead(linear.requires_grad_(False), cap)


def exact_logits(hidden: Tensor, head: LmHead) -> Tensor:
    logits = hidden.double() @ head.linear.weight.double().T
    if head.linear.bias is not None:
        logits = logits + head.linear.bias.double()
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def kl_by_definition(dense: Tensor, pruned: Tensor, head: LmHead) -> Tensor:
    p, q = (exact_logits(hidden, head).log_softmax(-1) for hidden in (dense, pruned))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("tokens", [1, CHUNK, TOKENS])
@pytest.mark.parametrize("distance", [0.03, 1.0, 10.0])
def test_kl_is_that_of_the_full_softmax(tokens: int, distance: float) -> None:
    head, dense = head_of(), normal(tokens, HIDDEN, seed=3)
    pruned = dense + normal(tokens, HIDDEN, seed=4, scale=distance)
    found = kl_divergence(pruned.unsqueeze(0), head, targets(dense, head), BYTES)[0]
    assert found.shape == (tokens,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kl_by_definition(dense, pruned, head), rtol=1e-3, atol=2e-5)


def test_a_bias_of_the_head_counts() -> None:
    head, dense = head_of(bias=True), normal(40, HIDDEN, seed=3)
    pruned = dense + normal(40, HIDDEN, seed=4)
    found = kl_divergence(pruned.unsqueeze(0), head, targets(dense, head), BYTES)[0]
    torch.testing.assert_close(found.double(), kl_by_definition(dense, pruned, head), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("distance", [0.03, 1.0, 10.0])
def test_kl_of_capped_logits_is_that_of_the_full_softmax(cap: float, bias: bool, distance: float) -> None:
    head, dense = head_of(bias=bias, cap=cap), normal(TOKENS, HIDDEN, seed=3)
    pruned = [dense + normal(TOKENS, HIDDEN, seed=seed, scale=distance) for seed in (4, 5)]
    found = kl_divergence(torch.stack(pruned), head, targets(dense, head), BYTES)
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
    assert kl_divergence(dense.unsqueeze(0), head, targets(dense, head), BYTES).abs().max() <= 1e-5


def test_bfloat16_finds_the_mean_of_float64() -> None:
    head, dense = head_of(torch.bfloat16), normal(2_000, HIDDEN, seed=3).bfloat16()
    pruned = (dense + normal(2_000, HIDDEN, seed=4, scale=0.3)).bfloat16()
    found = kl_divergence(pruned.unsqueeze(0), head, targets(dense, head), BYTES)[0].double().mean()
    assert float(found) == pytest.approx(float(kl_by_definition(dense, pruned, head).mean()), rel=0.02)


def test_bfloat16_is_right_token_by_token_where_logits_are_large() -> None:
    """Logits of 50 are rounded to quarters in bfloat16: more than the divergence of a good candidate."""
    head, dense = head_of(torch.bfloat16), normal(TOKENS, HIDDEN, seed=3, scale=4.0).bfloat16()
    pruned = (dense + normal(TOKENS, HIDDEN, seed=4, scale=0.05)).bfloat16()
    found = kl_divergence(pruned.unsqueeze(0), head, targets(dense, head), BYTES)[0].double()
    error = (found - kl_by_definition(dense, pruned, head)).square().mean().sqrt()
    assert float(error) < 0.01
    assert float(found.min()) > -0.01


def test_models_measured_together_come_out_as_alone() -> None:
    head, dense = head_of(), normal(TOKENS, HIDDEN, seed=3)
    students = [dense + normal(TOKENS, HIDDEN, seed=seed) for seed in (4, 5)]
    together = kl_divergence(torch.stack(students), head, targets(dense, head), BYTES)
    alone = [kl_divergence(student.unsqueeze(0), head, targets(dense, head), BYTES)[0] for student in students]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)  # but for rounding


def test_large_logits_do_not_overflow() -> None:
    head, dense = head_of(), normal(5, HIDDEN, seed=3, scale=1e3)
    found = kl_divergence(-dense.unsqueeze(0), head, targets(dense, head), BYTES)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), kl_by_definition(dense, -dense, head), rtol=1e-4, atol=1e-2)


def test_targets_of_parts_are_parts_of_targets() -> None:
    head, dense = head_of(), normal(TOKENS, HIDDEN, seed=3)
    whole = targets(dense, head)
    first, rest = targets(dense[:100], head), targets(dense[100:], head)
    torch.testing.assert_close(torch.cat([first.expected, rest.expected]), whole.expected)
    torch.testing.assert_close(torch.cat([first.normaliser, rest.normaliser]), whole.normaliser, rtol=1e-4, atol=1e-4)
    for part, rows in ((first, slice(0, 100)), (rest, slice(100, None))):
        assert torch.equal(whole[rows].hidden, part.hidden)
        torch.testing.assert_close(whole[rows].expected, part.expected)
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


def labels_of(tokens: int) -> Tensor:
    labels = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(6))
    labels[-1] = NO_LABEL
    return labels


@pytest.mark.parametrize("cap", [None, 2.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("distance", [0.03, 10.0])
def test_cross_entropy_is_that_of_the_following_tokens(cap: float | None, bias: bool, distance: float) -> None:
    head, dense, labels = head_of(bias=bias, cap=cap), normal(TOKENS, HIDDEN, seed=3), labels_of(TOKENS)
    pruned = torch.stack([dense + normal(TOKENS, HIDDEN, seed=seed, scale=distance) for seed in (4, 5)])
    found = CrossEntropy()(pruned, head, targets(dense, head), labels)
    log_p = exact_logits(pruned, head).log_softmax(-1)
    expected = -log_p.gather(-1, labels.clamp_min(0).view(1, -1, 1).expand(2, -1, 1)).squeeze(-1)
    expected[:, -1] = 0  # nothing follows
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert CrossEntropy().scored(TOKENS) == TOKENS - 1


def test_cross_entropy_of_confident_words_is_not_lost_to_rounding() -> None:
    """Logits of 50 are rounded to quarters in bfloat16, on both sides of the logarithm or on none."""
    head, dense = head_of(torch.bfloat16), normal(TOKENS, HIDDEN, seed=3, scale=6.0).bfloat16()
    exact = exact_logits(dense, head).log_softmax(-1)
    likeliest = exact.argmax(-1)
    found = cross_entropy(dense.unsqueeze(0), head, targets(dense, head), likeliest, BYTES)[0].double()
    whole = logits_of(dense, head).log_softmax(-1).gather(-1, likeliest.unsqueeze(1)).squeeze(1).neg().double()
    errors = [
        (one + exact.gather(-1, likeliest.unsqueeze(1)).squeeze(1)).square().mean().sqrt() for one in (found, whole)
    ]
    assert float(found.min()) > -0.01
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("k", [1, 8, 700, VOCABULARY, 10 * VOCABULARY])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_topk_divergence_is_over_the_dense_models_likeliest_words(k: int, cap: float | None) -> None:
    head, dense = head_of(bias=True, cap=cap), normal(TOKENS, HIDDEN, seed=3)
    pruned = torch.stack([dense + normal(TOKENS, HIDDEN, seed=seed) for seed in (4, 5)])
    found = topk_divergence(pruned, head, targets(dense, head), k, BYTES)
    own = exact_logits(dense, head)
    words = own.topk(min(k, VOCABULARY), -1).indices
    p = own.gather(-1, words).log_softmax(-1)
    q = torch.stack([exact_logits(student, head).gather(-1, words).log_softmax(-1) for student in pruned])
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("fitness", [KlDivergence, CrossEntropy, TopKDivergence])
def test_the_hidden_term_adds_what_is_missing_to_full_similarity(fitness: type) -> None:
    head, dense, labels = head_of(), normal(TOKENS, HIDDEN, seed=3), labels_of(TOKENS)
    pruned = torch.stack([dense, 3 * dense, -dense, dense + normal(TOKENS, HIDDEN, seed=4)])
    teacher = targets(dense, head)
    without, with_term = (fitness(hidden_weight=weight)(pruned, head, teacher, labels) for weight in (0.0, 2.0))
    added = (with_term - without).double()[:, :-1]
    similarity = torch.cosine_similarity(pruned.double(), dense.double(), dim=-1)[:, :-1]
    torch.testing.assert_close(added, 2.0 * (1.0 - similarity), rtol=1e-3, atol=1e-3)
    assert added[0].abs().max() < 1e-3 and added[1].abs().max() < 1e-3
    torch.testing.assert_close(added[2], torch.full_like(added[2], 4.0), rtol=1e-3, atol=1e-3)


def test_of_more_than_one_model_fewer_tokens_are_at_work_at_a_time() -> None:
    for models in (1, 3, 1_000):
        pieces = list(token_slices(TOKENS, models, BYTES))
        assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
        assert (pieces[0].start, pieces[-1].stop) == (0, TOKENS)
        longest = max(piece.stop - piece.start for piece in pieces)
        assert longest == 1 or 4 * TILE * models * longest <= BYTES


@pytest.mark.parametrize(
    "measure", [kl_divergence, lambda *a: cross_entropy(*a[:3], labels_of(TOKENS).clamp_min(0), a[3])]
)
def test_no_more_logits_exist_than_asked_for(measure: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    head, dense = head_of(), normal(TOKENS, HIDDEN, seed=3)
    teacher = targets(dense, head)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            nonlocal largest
            result = function(*arguments, **(named or {}))
            if isinstance(result, Tensor) and result.dim() and result.untyped_storage().nbytes() > 4 * result.shape[-1]:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        measure(torch.stack([dense + normal(TOKENS, HIDDEN, seed=4)] * 5), head, teacher, BYTES)
    whole = 4 * 5 * TOKENS * VOCABULARY
    assert largest <= BYTES < whole / 5


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("fitness", [KlDivergence(), CrossEntropy(), TopKDivergence(k=8)])
def test_products_over_the_vocabulary_are_of_plain_matrices(
    fitness: Fitness, cap: float | None, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the strides of a single model's (n, models, hidden), three-dimensional ones are a hundred times slower on a
    CPU.
    """
    head, dense, labels = head_of(bias=True, cap=cap), normal(TOKENS, HIDDEN, seed=3), labels_of(TOKENS)
    students = torch.stack([dense + normal(TOKENS, HIDDEN, seed=seed) for seed in range(4, 4 + models)])
    teacher = targets(dense, head)
    shapes: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def watched(inputs: Tensor, *others: Tensor) -> Tensor:
        assert inputs.dim() == 2 and inputs.stride(1) == 1  # rows may lie apart: that costs nothing
        shapes.append(tuple(inputs.shape))
        return linear(inputs, *others)

    expected = fitness(students, head, teacher, labels)
    monkeypatch.setattr(nn.functional, "linear", watched)
    assert torch.equal(fitness(students, head, teacher, labels), expected)
    assert len(shapes) > 1
    monkeypatch.undo()
    by_itself = torch.cat([fitness(student.unsqueeze(0), head, teacher, labels) for student in students])
    torch.testing.assert_close(expected, by_itself, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3)])
def test_logits_have_the_shape_of_their_hidden_states(shape: tuple[int, ...], bias: bool) -> None:
    head, words = head_of(bias=True), slice(100, 150)
    # (tokens, models, hidden), as models lie
    hidden = normal(*reversed(shape), HIDDEN, seed=3).movedim(0, len(shape) - 1)
    found = _raw_logits(hidden, head, words, bias)
    expected = hidden @ head.linear.weight[words].T + (head.linear.bias[words] if bias else 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk_bytes": 0}, "fitness.chunk_bytes=0 must be a whole number of at least 1048576"),
        ({"chunk_bytes": 1.5e7}, "fitness.chunk_bytes"),
        ({"hidden_weight": -1.0}, "fitness.hidden_weight=-1.0 must be a number of at least 0"),
        ({"hidden_weight": float("nan")}, "fitness.hidden_weight=nan"),
    ],
)
@pytest.mark.parametrize("fitness", [KlDivergence, CrossEntropy, TopKDivergence])
def test_settings_that_make_no_sense_are_told(fitness: type, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fitness(**settings)


def test_k_must_be_a_number_of_words() -> None:
    with pytest.raises(InputError, match="fitness.k=0 must be a whole number of at least 1"):
        TopKDivergence(k=0)
