"""Losses over the vocabulary, exact and without ever holding the teacher's logits.

For a dense model with logits t and probabilities p, and a pruned one with logits s = E h, where E is the output embedding,

    KL(p || softmax(s)) = sum_v p_v log p_v - sum_v p_v s_v + logsumexp(s)

and the middle term is `h . (sum_v p_v E_v)`: the pruned model's hidden state times the dense model's *expected embedding*. So the
dense model's side of a token is one vector and one number, computed once, and a candidate needs its own logits only for one
logsumexp. Hidden states are those behind the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK = 128  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Targets:
    """The dense model's side of the KL divergence for n tokens.

    Attributes:
        expected: (n, hidden) float32, the expected output embedding. (A head's bias drops out: both sides have it.)
        constant: (n,) float32, the sum of p log p.
    """

    expected: Tensor
    constant: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        return Targets(self.expected.to(device), self.constant.to(device))


def logits_of(hidden: Tensor, head: nn.Linear) -> Tensor:
    """(n, hidden) -> (n, vocabulary) float32, multiplied in the head's dtype."""
    logits: Tensor = head(hidden.to(head.weight.dtype))
    return logits.float()


def targets(hidden: Tensor, head: nn.Linear) -> Targets:
    """The teacher's side from the dense model's final hidden states (n, hidden)."""
    expected, normaliser = [], []
    for chunk in hidden.split(CHUNK):
        logits = logits_of(chunk, head)
        normaliser.append(logits.logsumexp(-1))
        p = logits.sub_(normaliser[-1].unsqueeze(1)).exp_()
        expected.append((p.to(head.weight.dtype) @ head.weight).float())
    embedding = torch.cat(expected)
    return Targets(embedding, (hidden.float() * embedding).sum(-1) - torch.cat(normaliser))


def kl_divergence(hidden: Tensor, head: nn.Linear, teacher: Targets) -> Tensor:
    """KL(dense || pruned) of each token, (n,) float32, from the pruned model's final hidden states (n, hidden)."""
    normaliser = torch.cat([logits_of(chunk, head).logsumexp(-1) for chunk in hidden.split(CHUNK)])
    return teacher.constant - (hidden.float() * teacher.expected).sum(-1) + normaliser


def negative_log_likelihood(hidden: Tensor, head: nn.Linear, ids: Tensor) -> Tensor:
    """-log p of each following token, (batch, tokens - 1), from hidden (batch, tokens, hidden) and ids (batch, tokens)."""
    losses = [
        nn.functional.cross_entropy(logits_of(chunk, head), wanted, reduction="none")
        for chunk, wanted in zip(hidden[:, :-1].flatten(0, 1).split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1)
