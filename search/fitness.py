"""Losses over the vocabulary, exact and without ever holding the logits of more than a few tokens.

For a dense model with hidden states t and probabilities p, and a pruned one with hidden states s, the logits differ by
d = E (s - t), where E is the output embedding, and

    KL(dense || pruned) = log sum_v p_v exp(d_v) - (s - t) . sum_v p_v E_v

So the dense model's side is its hidden state, its log-normaliser and its *expected embedding*, kept for each token; its logits
are made once for all candidates that are measured together; and only the small difference d is rounded to the model's
dtype, not logits of 20 and more, whose rounding in bfloat16 would be larger than the divergence of a good candidate.
Hidden states are those behind the final norm. Capped logits (Gemma 2) are not linear: both sides are then computed in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.architecture import Head

CHUNK = 128  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Targets:
    """The dense model's side of the KL divergence for n tokens.

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

    @staticmethod
    def join(targets: Sequence[Targets]) -> Targets:
        """Several runs of tokens as one."""
        return Targets(
            torch.cat([one.hidden for one in targets]),
            torch.cat([one.expected for one in targets]),
            torch.cat([one.normaliser for one in targets]),
        )


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(n, hidden) -> (n, vocabulary) float32, multiplied in the head's dtype."""
    logits: Tensor = head.linear(hidden.to(head.linear.weight.dtype)).float()
    return logits if head.cap is None else logits.div_(head.cap).tanh_().mul_(head.cap)


def targets(hidden: Tensor, head: Head) -> Targets:
    """The teacher's side from the dense model's final hidden states (n, hidden)."""
    expected, normaliser = [], []
    for chunk in hidden.split(CHUNK):
        logits = logits_of(chunk, head)
        normaliser.append(logits.logsumexp(-1))
        p = logits.sub_(normaliser[-1].unsqueeze(1)).exp_()
        expected.append((p.to(head.linear.weight.dtype) @ head.linear.weight).float())
    return Targets(hidden, torch.cat(expected), torch.cat(normaliser))


def kl_divergence(students: Sequence[Tensor], head: Head, teacher: Targets) -> Tensor:
    """KL(dense || pruned) of each token for several pruned models.

    Args:
        students: For each model its final hidden states (n, hidden).
        head: The output embedding (vocabulary, hidden) and bias, which all share, and the logits' cap.
        teacher: The dense model's side of the same n tokens.

    Returns:
        (students, n) float32.
    """
    count = len(teacher.normaliser)
    divergence = torch.empty(len(students), count, device=teacher.normaliser.device)
    for start in range(0, count, CHUNK):
        rows = slice(start, start + CHUNK)
        log_p = logits_of(teacher.hidden[rows], head).sub_(teacher.normaliser[rows].unsqueeze(1))
        for student, out in zip(students, divergence, strict=True):
            if head.cap is None:
                step = student[rows].float() - teacher.hidden[rows].float()
                weight = head.linear.weight
                change = nn.functional.linear(step.to(weight.dtype), weight).float()  # a bias is the same on both sides
                out[rows] = change.add_(log_p).logsumexp(-1) - (step * teacher.expected[rows]).sum(-1)
            else:
                log_q = logits_of(student[rows], head).log_softmax(-1)
                out[rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence


def negative_log_likelihood(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """-log p of each following token, (batch, tokens - 1), from hidden (batch, tokens, hidden) and ids (batch, tokens)."""
    losses = [
        nn.functional.cross_entropy(logits_of(chunk, head), wanted, reduction="none")
        for chunk, wanted in zip(hidden[:, :-1].flatten(0, 1).split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1)
