"""The losses that a search may minimise: exact over the whole vocabulary, with only a few of the logits in memory.

For a dense model with hidden states t and probabilities p, and a pruned one with hidden states s, the logits differ by
d = E (s - t), where E is the output embedding, and

    KL(dense || pruned) = log sum_v p_v exp(d_v) - (s - t) . sum_v p_v E_v

So all that is kept of the dense model for a token is its hidden state, its log-normaliser and its *expected embedding*.
Its logits are made once for all candidates that are measured together. Only the small difference d is rounded to the
model's dtype: logits are 20 and more, and to round them to bfloat16 would be a larger error than the divergence of a
good candidate. Products are taken in tiles of the vocabulary that stay in the processor's caches. Hidden states are
those behind the final norm. Capped logits (Gemma 2) are not linear in the hidden states, so there the logits of each
tile are capped on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from supernet.errors import InputError
from supernet.models.forward import LmHead

CHUNK_BYTES = 32 << 20  # of logits in float32 that exist at a time
TILE = 2048  # words of the vocabulary in a product: fewer waste the matrix units, more leave the caches
NO_LABEL = -1  # the label of the last token of a sequence, which none follows


@dataclass(frozen=True)
class Targets:
    """What is kept of the dense model for n tokens, to compare other models with.

    Attributes:
        hidden: (n, hidden), the final hidden states, behind the final norm.
        expected: (n, hidden) float32, the expected output embedding.
        normaliser: (n,) float32, the logsumexp of the logits.
    """

    hidden: Tensor
    expected: Tensor
    normaliser: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """Return the same targets on another device."""
        return Targets(self.hidden.to(device), self.expected.to(device), self.normaliser.to(device))

    def __getitem__(self, rows: slice) -> Targets:
        """Return the targets of some of the tokens."""
        return Targets(self.hidden[rows], self.expected[rows], self.normaliser[rows])


class Fitness(Protocol):
    """What the search minimises. It gives the loss of each token, for several pruned models at once.

    Attributes:
        goal: What is searched for, in words that fit behind "searched for".
    """

    goal: ClassVar[str]

    @property
    def chunk_bytes(self) -> int:
        """How many bytes of logits in float32 may exist at a time."""
        ...

    @property
    def is_divergence(self) -> bool:
        """Whether the loss measures how far a model is from the dense one, whose own loss is then 0."""
        ...

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """Return the losses of n tokens.

        Args:
            students: (models, n, hidden) final hidden states of the pruned models, in the dtype of the head.
            head: The output embedding (vocabulary, hidden) and bias, which all models share, and the logits' cap.
            teacher: The dense model's side of the same n tokens.
            labels: (n,), the token that follows each token; `NO_LABEL` for the last one of a sequence.

        Returns:
            (models, n) float32.
        """
        ...

    def scored(self, tokens: int) -> int:
        """Return how many of a sequence's tokens have a loss."""
        ...


@dataclass(frozen=True)
class _Settings:
    """The settings that all losses have in common.

    Attributes:
        chunk_bytes: How many bytes of logits in float32 may exist at a time.
        hidden_weight: The weight of a second term in the loss of every token: 1 - cosine similarity of the final hidden
            states (Týr-the-Pruner adds such a term for the states of three layers).
    """

    is_divergence: ClassVar[bool] = True

    chunk_bytes: int = CHUNK_BYTES
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if type(self.chunk_bytes) is not int or self.chunk_bytes < 1 << 20:
            raise InputError(
                f"fitness.chunk_bytes={self.chunk_bytes} must be a whole number of at least {1 << 20} bytes"
            )
        if type(self.hidden_weight) not in (int, float) or not 0 <= self.hidden_weight < torch.inf:
            raise InputError(
                f"fitness.hidden_weight={self.hidden_weight} must be a number of at least 0; 0 leaves that term out"
            )

    def scored(self, tokens: int) -> int:
        """Return how many tokens have a loss: all of them."""
        return tokens

    def _hidden_term(self, students: Tensor, teacher: Targets) -> Tensor | float:
        if not self.hidden_weight:
            return 0.0
        similarity = nn.functional.cosine_similarity(students.float(), teacher.hidden.float(), dim=-1)
        return self.hidden_weight * (1.0 - similarity)


@dataclass(frozen=True)
class KlDivergence(_Settings):
    """KL(dense || pruned) over the whole vocabulary."""

    goal: ClassVar[str] = "the smallest KL divergence to the unpruned model"

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """Return the divergence of each token from the dense model."""
        return kl_divergence(students, head, teacher, self.chunk_bytes) + self._hidden_term(students, teacher)


@dataclass(frozen=True)
class CrossEntropy(_Settings):
    """-log p of the token that follows, whose mean is the logarithm of the perplexity.

    The last token of each sequence has no loss, as none follows.
    """

    goal: ClassVar[str] = "the smallest cross-entropy"
    is_divergence: ClassVar[bool] = False

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """Return -log p of the token that follows each token."""
        known = labels != NO_LABEL
        losses = cross_entropy(students, head, teacher, labels.clamp_min(0), self.chunk_bytes)
        return (losses + self._hidden_term(students, teacher)) * known

    def scored(self, tokens: int) -> int:
        """Return how many tokens have a loss: the last one predicts nothing."""
        return tokens - 1


@dataclass(frozen=True)
class TopKDivergence(_Settings):
    """KL(dense || pruned) over the dense model's k likeliest words alone: the sparse KL of EvoPress and Týr-the-Pruner.

    Both distributions are renormalised over these words, so the probability that the pruned model gives to other words
    goes unseen. It is here for comparison, and costs no less than the exact divergence.
    """

    goal: ClassVar[str] = "the smallest KL divergence to the unpruned model among its likeliest tokens"

    k: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.k) is not int or self.k < 1:
            raise InputError(f"fitness.k={self.k} must be a whole number of at least 1; Týr's is 8192")

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """Return the divergence of each token among the dense model's likeliest words."""
        return topk_divergence(students, head, teacher, self.k, self.chunk_bytes) + self._hidden_term(students, teacher)


def token_slices(tokens: int, models: int, chunk_bytes: int) -> Iterator[slice]:
    """Cut tokens into runs whose logits over one tile of words, for all models, fit in `chunk_bytes`."""
    size = max(1, chunk_bytes // (4 * models * TILE))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _tiles(head: LmHead) -> Iterator[slice]:
    """Cut the vocabulary into runs of words.

    Their length is the same whatever is measured, so that the models that are measured together change each other's
    results in the last bits at most.
    """
    for start in range(0, len(head.linear.weight), TILE):
        yield slice(start, start + TILE)


def _raw_logits(hidden: Tensor, head: LmHead, words: slice, bias: bool = True) -> Tensor:
    """Return logits without the cap: (..., hidden) -> (..., words) in the head's dtype.

    The hidden states are made one matrix first: those of a single model have odd strides, with which the product would
    be a hundred times slower on a CPU.
    """
    own = head.linear.bias
    weight = head.linear.weight[words]
    rows = hidden.to(weight.dtype).reshape(-1, hidden.shape[-1])
    logits = nn.functional.linear(rows, weight, own[words] if bias and own is not None else None)
    return logits.view(*hidden.shape[:-1], -1)


def _capped(logits: Tensor, head: LmHead) -> Tensor:
    """Cap logits in float32. The logits are changed in place, but not the result of tanh, which autograd needs."""
    return logits if head.cap is None else logits.div_(head.cap).tanh_() * head.cap


ALL = slice(None)


def logits_of(hidden: Tensor, head: LmHead) -> Tensor:
    """Return capped logits: (n, hidden) -> (n, vocabulary) float32. The product is taken in the head's dtype."""
    return _capped(_raw_logits(hidden, head, ALL).float(), head)


def targets(hidden: Tensor, head: LmHead, chunk_bytes: int = CHUNK_BYTES) -> Targets:
    """Return what is kept of the dense model, from its final hidden states (n, hidden).

    No more than `chunk_bytes` of logits in float32 exist at a time.
    """
    expected, normaliser = [], []
    for chunk in hidden.split(max(1, chunk_bytes // (4 * len(head.linear.weight)))):
        logits = logits_of(chunk, head)
        normaliser.append(logits.logsumexp(-1))
        p = logits.sub_(normaliser[-1].unsqueeze(1)).exp_()
        expected.append(_expected(p, head))
    return Targets(hidden, torch.cat(expected), torch.cat(normaliser))


def _expected(p: Tensor, head: LmHead) -> Tensor:
    """Return the expected output embedding: probabilities (n, vocabulary) -> (n, hidden), both float32.

    A divergence is the small difference between a product with it and the logarithm of a sum: if it were rounded to
    bfloat16, that would make a quarter of the divergence's error.
    """
    total = torch.zeros(len(p), head.linear.weight.shape[1], device=p.device)
    for words in _tiles(head):
        total.addmm_(p[:, words], head.linear.weight[words].float())
    return total


def kl_divergence(students: Tensor, head: LmHead, teacher: Targets, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Return KL(dense || pruned) of each token for several pruned models.

    Args:
        students: (models, n, hidden) final hidden states of the pruned models.
        head: The output embedding (vocabulary, hidden) and bias, which all models share, and the logits' cap.
        teacher: The dense model's side of the same n tokens.
        chunk_bytes: How many bytes of logits in float32 may exist at a time.

    Returns:
        (models, n) float32.
    """
    divergence = torch.empty(students.shape[:2], dtype=torch.float32, device=students.device)
    for rows in token_slices(students.shape[1], len(students), chunk_bytes):
        step, here = _steps(students[:, rows], teacher[rows]), teacher[rows]
        if head.cap is None:
            log_ratio = _log_ratio(step, head, here)
            divergence[:, rows] = log_ratio - torch.linalg.vecdot(step, here.expected.unsqueeze(1)).T
        else:
            log_ratio, cross = _capped_terms(step, head, here)
            divergence[:, rows] = log_ratio + cross
    return divergence


def cross_entropy(
    students: Tensor, head: LmHead, teacher: Targets, labels: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Return -log p of the words `labels` (n,), as (models, n) float32.

    The other arguments are those of `kl_divergence`.
    """
    losses = torch.empty(students.shape[:2], dtype=torch.float32, device=students.device)
    for rows in token_slices(students.shape[1], len(students), chunk_bytes):
        step, here, words = _steps(students[:, rows], teacher[rows]), teacher[rows], labels[rows]
        terms = _log_ratio(step, head, here) if head.cap is None else _capped_terms(step, head, here)[0]
        wanted = _logits_of_words(step, head, here, words)
        losses[:, rows] = terms + here.normaliser - _capped(wanted, head)
    return losses


def _logits_of_words(step: Tensor, head: LmHead, teacher: Targets, words: Tensor) -> Tensor:
    """Return the logit of one word for each token: steps (n, models, hidden), words (n,) -> (models, n).

    The dense model's logit and the difference are each rounded as in the products over the whole vocabulary. What they
    lose there, as parts of the normaliser, is then lost here, too.
    """
    weight = head.linear.weight
    embeddings = weight[words].float()
    raw = torch.linalg.vecdot(teacher.hidden.to(weight.dtype).float(), embeddings)
    if head.linear.bias is not None:
        raw = raw + head.linear.bias[words].float()
    change = torch.linalg.vecdot(step.to(weight.dtype).float(), embeddings.unsqueeze(1))
    logits: Tensor = change.to(weight.dtype).float() + raw.to(weight.dtype).float().unsqueeze(1)
    return logits.T


def topk_divergence(students: Tensor, head: LmHead, teacher: Targets, k: int, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Return the KL divergence over the dense model's k likeliest words alone.

    The other arguments and the result are those of `kl_divergence`.
    """
    k = min(k, len(head.linear.weight))
    divergence = torch.empty(students.shape[:2], dtype=torch.float32, device=students.device)
    for rows in token_slices_of_all_words(students.shape[1], head, chunk_bytes):
        raw = _raw_logits(teacher.hidden[rows], head, ALL).float()
        words = raw.topk(k, -1).indices  # the cap is monotonic
        raw = raw.gather(-1, words)
        log_p = _capped(raw.clone(), head).log_softmax(-1)
        step = _steps(students[:, rows], teacher[rows])
        for model in range(len(students)):  # one at a time, as its logits are (n, vocabulary)
            change = _raw_logits(step[:, model], head, ALL, bias=False).gather(-1, words).float()
            log_q = _capped(change.add_(raw), head).log_softmax(-1)
            divergence[model, rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence


def token_slices_of_all_words(tokens: int, head: LmHead, chunk_bytes: int) -> Iterator[slice]:
    """Cut tokens into runs whose logits over the whole vocabulary, for one model, fit in `chunk_bytes`."""
    size = max(1, chunk_bytes // (4 * len(head.linear.weight)))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _steps(students: Tensor, teacher: Targets) -> Tensor:
    """Return s - t, the way from the dense model's states: (models, n, hidden) -> (n, models, hidden) float32."""
    return (students.float() - teacher.hidden.float()).transpose(0, 1).contiguous()


def _log_ratio(step: Tensor, head: LmHead, teacher: Targets) -> Tensor:
    """Return log sum_v p_v exp(d_v): steps (n, models, hidden) -> (models, n). A bias cancels in the differences d."""
    count, models, _ = step.shape
    step = step.to(head.linear.weight.dtype)
    total = torch.zeros(count, models, device=step.device)
    for words in _tiles(head):
        total += _log_terms(step, head, teacher, words).exp_().sum(-1)
    found = total.log()
    if bool(torch.isfinite(found).all()):
        return found.T
    found = torch.full_like(total, -torch.inf)  # beyond what exp can hold
    for words in _tiles(head):
        found = torch.logaddexp(found, _log_terms(step, head, teacher, words).logsumexp(-1))
    return found.T


def _log_terms(step: Tensor, head: LmHead, teacher: Targets, words: slice) -> Tensor:
    """Return log p_v + d_v: steps (n, models, hidden) in the head's dtype -> (n, models, words) float32."""
    log_p = _raw_logits(teacher.hidden, head, words).float().sub_(teacher.normaliser.unsqueeze(1))
    return torch.add(_raw_logits(step, head, words, bias=False), log_p.unsqueeze(1))


def _capped_terms(step: Tensor, head: LmHead, teacher: Targets) -> tuple[Tensor, Tensor]:
    """Return the two terms of the divergence for capped logits, (models, n) each.

    With capped logits z of the dense model and z' of the pruned one they are log sum_v p_v exp(z'_v - z_v) and
    sum_v p_v (z_v - z'_v). The pruned model's raw logits are the dense model's plus the difference, so that both sides
    are rounded alike.
    """
    count, models, _ = step.shape
    step = step.to(head.linear.weight.dtype)
    log_ratio = torch.full((count, models), -torch.inf, device=step.device)
    cross = torch.zeros(count, models, device=step.device)
    for words in _tiles(head):
        raw = _raw_logits(teacher.hidden, head, words).float().unsqueeze(1).detach()  # where a head may be trained, too
        dense = _capped(raw.clone(), head)
        log_p = dense - teacher.normaliser.view(-1, 1, 1)
        change = _capped(torch.add(_raw_logits(step, head, words, bias=False), raw), head).sub_(dense)
        cross -= (log_p.exp() * change).sum(-1)
        log_ratio = torch.logaddexp(log_ratio, change.add_(log_p).logsumexp(-1))
    return log_ratio.T, cross.T


def negative_log_likelihood(hidden: Tensor, head: LmHead, ids: Tensor) -> Tensor:
    """Return -log p of each token that follows another one, (batch, tokens - 1).

    Args:
        hidden: (batch, tokens, hidden) final hidden states, behind the final norm.
        head: The output embedding and its bias.
        ids: (batch, tokens).
    """
    size = max(1, CHUNK_BYTES // (4 * len(head.linear.weight)))
    losses = [
        nn.functional.cross_entropy(logits_of(chunk, head), wanted, reduction="none")
        for chunk, wanted in zip(
            hidden[:, :-1].flatten(0, 1).split(size), ids[:, 1:].flatten().split(size), strict=True
        )
    ]
    return torch.cat(losses).view(len(ids), -1)
