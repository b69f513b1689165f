"""What structured methods share that only rank members: sums over the parameters of a member, and what a
ranking keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from supernet.errors import InputError
from supernet.models.architecture import SubBlock


def member_layers(part: SubBlock) -> tuple[str, ...]:
    """The layers that lose rows or columns when a member goes; none for a sub-block without members."""
    if part.groups is None:
        return ()
    return tuple(dict.fromkeys((*(rows.layer for rows in part.groups.rows), part.column)))


def sum_by_member(part: SubBlock, matrices: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sum a quantity of each parameter over those that go with a member.

    Args:
        part: With members.
        matrices: Of each layer in `member_layers`, (d_out, d_in).
        biases: Of those that lose rows and have biases, (d_out,).

    Returns:
        (members,) float32.
    """
    assert part.groups is not None
    members, biases = part.groups.members, biases or {}
    total = matrices[part.column].sum(0, dtype=torch.float64).view(members, -1).sum(1)
    for rows in part.groups.rows:
        chosen = slice(rows.offset, rows.offset + members * rows.count)
        total += matrices[rows.layer][chosen].sum(1, dtype=torch.float64).view(members, -1).sum(1)
        if rows.layer in biases:
            total += biases[rows.layer][chosen].double().view(members, -1).sum(1)
    return total.float()


def best(scores: Tensor, kept: Sequence[int]) -> list[Tensor]:
    """The members with the highest scores, rising, for each number in `kept`; of equal ones the first. scores:
    (members,).
    """
    ranking = scores.argsort(descending=True, stable=True)
    return [ranking[:count].sort().values for count in kept]


def finite(scores: Tensor, where: str, what: str = "activations") -> Tensor:
    """The scores themselves; InputError if one is NaN or infinite, which says what it comes from."""
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{where}: {what} are not finite; check the model's weights, or use dtype=float32")
    return scores


@dataclass
class Projected:
    """Sums over the calibration tokens of what each member puts into the layer's output: AMP's scores.

    Of heads that is ||x_h W_h||_1, with x_h (width,) the head's inputs and W_h its columns of the weight. Of a neuron
    (width 1) it is |x_j| alone, without the weight, as in the authors' code (c2d-usp/Efficient-LLMs-with-AMP,
    amp_criterion.py).

    Attributes:
        weight: (members, width, d_out) float32; nothing of neurons.
        total: (members,) float64.
        tokens: Rows of X so far.
    """

    weight: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, dense: Tensor, width: int) -> Projected:
        """Before any batch, for a layer of weight (d_out, members * width)."""
        members = dense.shape[1] // width
        weight = dense.detach().T.float().reshape(members, width, -1) if width > 1 else dense.new_empty(members, 1, 0)
        return cls(weight, torch.zeros(members, dtype=torch.float64, device=dense.device))

    def add(self, inputs: Tensor) -> None:
        """Add a batch: X (tokens, members * width), of any float dtype."""
        X = inputs.float()
        members, width, _ = self.weight.shape
        if width == 1:
            self.total += X.abs().sum(0)
        else:
            for member in range(members):  # all at once would take members times the memory of the layer's output
                output = X[:, member * width : (member + 1) * width] @ self.weight[member]
                self.total[member] += output.abs().sum()
        self.tokens += len(X)

    @property
    def mean(self) -> Tensor:
        """(members,) float32."""
        return (self.total / max(1, self.tokens)).float()
