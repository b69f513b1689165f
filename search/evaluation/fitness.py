"""Losses over the vocabulary, exact and without ever holding more logits than fit in a set number of bytes.

For a dense model with hidden states t and probabilities p, and a pruned one with hidden states s, the logits differ by
d = E (s - t), where E is the output embedding, and

    KL(dense || pruned) = log sum_v p_v exp(d_v) - (s - t) . sum_v p_v E_v

So the dense model's side is its hidden state, its log-normaliser and its *expected embedding*, kept for each token; its
logits are made once for all candidates that are measured together; and only the small difference d is rounded to the
model's dtype, not logits of 20 and more, whose rounding in bfloat16 would be larger than the divergence of a good
candidate. Products are taken in tiles of the vocabulary that stay in the processor's caches. Hidden states are those
behind the final norm. Capped logits (Gemma 2) are not linear: there each tile's logits are capped on both sides.
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
NO_LABEL = -1  # behind the last token of a sequence


@dataclass(frozen=True)
class Targets:
    """The dense model's side for n tokens.

    Attributes:
        hidden: (n, hidden), final hidden states.
        expected: (n, hidden) float32, expected output embedding.
        normaliser: (n,) float32, logsumexp of the logits.
    """

    hidden: Tensor
    expected: Tensor
    normaliser: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        return Targets(self.hidden.to(device), self.expected.to(device), self.normaliser.to(device))

    def __getitem__(self, rows: slice) -> Targets:
        """Of some of the tokens."""
        return Targets(self.hidden[rows], self.expected[rows], self.normaliser[rows])


class Fitness(Protocol):
    """What the search minimises: a loss of every token, of several pruned models at once.

    Attributes:
        goal: What is searched for, in words that fit behind "searched for".
    """

    goal: ClassVar[str]

    @property
    def chunk_bytes(self) -> int:
        """Of logits that exist at a time."""
        ...

    @property
    def is_divergence(self) -> bool:
        """Whether it measures how far a model is from the dense one, whose own loss is then 0."""
        ...

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """The losses of n tokens.

        Args:
            students: (models, n, hidden) final hidden states in the dtype of the head.
            head: The output embedding (vocabulary, hidden) and bias, which all share, and the logits' cap.
            teacher: The dense model's side of the same n tokens.
            labels: (n,) the tokens that follow; `NO_LABEL` behind the last one of a sequence.

        Returns:
            (models, n) float32.
        """
        ...

    def scored(self, tokens: int) -> int:
        """How many tokens of a sequence have a loss."""
        ...


@dataclass(frozen=True)
class _Settings:
    """What all have in common.

    Attributes:
        chunk_bytes: Of logits that exist at a time.
        hidden_weight: Of 1 - cosine similarity of the final hidden states, added to the loss of every token
            (Týr-the-Pruner adds such a term, of three layers).
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
    """-log p of the following token, without the last token of each sequence: the logarithm of the perplexity."""

    goal: ClassVar[str] = "the smallest cross-entropy"
    is_divergence: ClassVar[bool] = False

    def __call__(self, students: Tensor, head: LmHead, teacher: Targets, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each token that follows."""
        known = labels != NO_LABEL
        losses = cross_entropy(students, head, teacher, labels.clamp_min(0), self.chunk_bytes)
        return (losses + self._hidden_term(students, teacher)) * known

    def scored(self, tokens: int) -> int:
        """Return how many tokens have a loss: the last one predicts nothing."""
        return tokens - 1


@dataclass(frozen=True)
class TopKDivergence(_Settings):
    """KL(dense || pruned) with both renormalised over the dense model's k likeliest words, as EvoPress's and Týr's
    sparse KL.

    What the pruned model gives to other words goes unseen; it is here for comparison, and is no cheaper than the exact
    one.
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
    """Runs of tokens whose logits over a tile of the vocabulary, of so many models, stay within the bytes."""
    size = max(1, chunk_bytes // (4 * models * TILE))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _tiles(head: LmHead) -> Iterator[slice]:
    """Runs of words, of one length whatever is measured: what is measured beside a model changes no more than its
    rounding.
    """
    for start in range(0, len(head.linear.weight), TILE):
        yield slice(start, start + TILE)


def _raw_logits(hidden: Tensor, head: LmHead, words: slice, bias: bool = True) -> Tensor:
    """(..., hidden) -> (..., words) without the cap, in the head's dtype.

    As one matrix: of a single model the strides are odd, and the product would be a hundred times slower on a CPU.
    """
    own = head.linear.bias
    weight = head.linear.weight[words]
    rows = hidden.to(weight.dtype).reshape(-1, hidden.shape[-1])
    logits = nn.functional.linear(rows, weight, own[words] if bias and own is not None else None)
    return logits.view(*hidden.shape[:-1], -1)


def _capped(logits: Tensor, head: LmHead) -> Tensor:
    """Of logits in float32, which it may change; not what tanh gave: autograd needs that."""
    return logits if head.cap is None else logits.div_(head.cap).tanh_() * head.cap


ALL = slice(None)


def logits_of(hidden: Tensor, head: LmHead) -> Tensor:
    """(n, hidden) -> (n, vocabulary) float32, multiplied in the head's dtype."""
    return _capped(_raw_logits(hidden, head, ALL).float(), head)


def targets(hidden: Tensor, head: LmHead, chunk_bytes: int = CHUNK_BYTES) -> Targets:
    """The teacher's side from the dense model's final hidden states (n, hidden)."""
    expected, normaliser = [], []
    for chunk in hidden.split(max(1, chunk_bytes // (4 * len(head.linear.weight)))):
        logits = logits_of(chunk, head)
        normaliser.append(logits.logsumexp(-1))
        p = logits.sub_(normaliser[-1].unsqueeze(1)).exp_()
        expected.append(_expected(p, head))
    return Targets(hidden, torch.cat(expected), torch.cat(normaliser))


def _expected(p: Tensor, head: LmHead) -> Tensor:
    """Expected output embedding (n, hidden) of probabilities (n, vocabulary), both float32: a divergence is a small
    difference of it and the logarithm of a sum, so rounding it to bfloat16 would be a quarter of the divergence's
    error.
    """
    total = torch.zeros(len(p), head.linear.weight.shape[1], device=p.device)
    for words in _tiles(head):
        total.addmm_(p[:, words], head.linear.weight[words].float())
    return total


def kl_divergence(students: Tensor, head: LmHead, teacher: Targets, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """KL(dense || pruned) of each token for several pruned models.

    Args:
        students: (models, n, hidden) final hidden states.
        head: The output embedding (vocabulary, hidden) and bias, which all share, and the logits' cap.
        teacher: The dense model's side of the same n tokens.
        chunk_bytes: Of logits in float32 that exist at a time.

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
    """-log p of the words `labels` (n,), (models, n) float32; the other arguments are those of `kl_divergence`."""
    losses = torch.empty(students.shape[:2], dtype=torch.float32, device=students.device)
    for rows in token_slices(students.shape[1], len(students), chunk_bytes):
        step, here, words = _steps(students[:, rows], teacher[rows]), teacher[rows], labels[rows]
        terms = _log_ratio(step, head, here) if head.cap is None else _capped_terms(step, head, here)[0]
        wanted = _logits_of_words(step, head, here, words)
        losses[:, rows] = terms + here.normaliser - _capped(wanted, head)
    return losses


def _logits_of_words(step: Tensor, head: LmHead, teacher: Targets, words: Tensor) -> Tensor:
    """A word's logit for each token, (models, n), from words (n,) and steps (n, models, hidden).

    The dense model's and the difference are each rounded as in the products over the whole vocabulary, so that what
    they lose there, where they are part of the normaliser, is lost here, too.
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
    """KL of the distributions over the dense model's k likeliest words alone; arguments and result as of
    `kl_divergence`.
    """
    k = min(k, len(head.linear.weight))
    divergence = torch.empty(students.shape[:2], dtype=torch.float32, device=students.device)
    for rows in token_slices_of_all_words(students.shape[1], head, chunk_bytes):
        raw = _raw_logits(teacher.hidden[rows], head, ALL).float()
        words = raw.topk(k, -1).indices  # the cap is monotonic
        raw = raw.gather(-1, words)
        log_p = _capped(raw.clone(), head).log_softmax(-1)
        step = _steps(students[:, rows], teacher[rows])
        for model in range(len(students)):  # (n, vocabulary) of one at a time
            change = _raw_logits(step[:, model], head, ALL, bias=False).gather(-1, words).float()
            log_q = _capped(change.add_(raw), head).log_softmax(-1)
            divergence[model, rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence


def token_slices_of_all_words(tokens: int, head: LmHead, chunk_bytes: int) -> Iterator[slice]:
    """Runs of tokens whose logits over the whole vocabulary, of one model, stay within the bytes."""
    size = max(1, chunk_bytes // (4 * len(head.linear.weight)))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _steps(students: Tensor, teacher: Targets) -> Tensor:
    """(models, n, hidden) -> (n, models, hidden) float32, from the dense model's hidden states."""
    return (students.float() - teacher.hidden.float()).transpose(0, 1).contiguous()


def _log_ratio(step: Tensor, head: LmHead, teacher: Targets) -> Tensor:
    """Log sum_v p_v exp(d_v), (models, n), from steps (n, models, hidden); a bias is the same on both sides."""
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
    """Log p_v + d_v, (n, models, words) float32, from steps (n, models, hidden) in the head's dtype."""
    log_p = _raw_logits(teacher.hidden, head, words).float().sub_(teacher.normaliser.unsqueeze(1))
    return torch.add(_raw_logits(step, head, words, bias=False), log_p.unsqueeze(1))


def _capped_terms(step: Tensor, head: LmHead, teacher: Targets) -> tuple[Tensor, Tensor]:
    """With capped logits z of the dense model and z' of the pruned: log sum_v p_v exp(z'_v - z_v) and sum_v p_v (z_v -
    z'_v).

    Both (models, n). Raw logits are the dense model's and the difference, so that both sides are rounded alike.
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
    """-log p of each following token, (batch, tokens - 1), from hidden (batch, tokens, hidden) and ids (batch,
    tokens).
    """
    size = max(1, CHUNK_BYTES // (4 * len(head.linear.weight)))
    losses = [
        nn.functional.cross_entropy(logits_of(chunk, head), wanted, reduction="none")
        for chunk, wanted in zip(
            hidden[:, :-1].flatten(0, 1).split(size), ids[:, 1:].flatten().split(size), strict=True
        )
    ]
    return torch.cat(losses).view(len(ids), -1)
