"""What structured methods share that choose members (KV groups, query heads, neurons) by scores.

That is: their units, sums over the parameters of a member, and what a ranking keeps.

Members with the lowest scores go first, and the weights of the others stay as they are. One order serves all levels, so
that they are nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import NoSurvey, Task
from local_prune.statistics import finite
from supernet.candidates import Candidate, Members
from supernet.errors import InputError
from supernet.models.architecture import SubBlock, by_query_heads, sub_blocks
from supernet.models.prunables import Prunable, member_prunables


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


@dataclass(frozen=True)
class MembersPruner(NoSurvey):
    """What the methods have in common.

    Attributes:
        multiple: Kept neurons are multiples of this.
        query_heads: Take single query heads (Týr-the-Pruner) instead of KV groups.
    """

    multiple: int = 32
    query_heads: bool = False

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """See `Pruner`."""
        return member_prunables(parts, self.multiple, self.query_heads)

    def parts(self, model: PreTrainedModel) -> tuple[SubBlock, ...]:
        """The model's sub-blocks, with the members that are asked for."""
        return by_query_heads(sub_blocks(model)) if self.query_heads else sub_blocks(model)


@dataclass(frozen=True)
class SurveyedPruner(MembersPruner):
    """A method whose scores all come from its survey."""

    def statistics(self, dense: Tensor, width: int) -> None:
        """None: the inputs of the pruned model play no part."""

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """See `Pruner`; with the dense weights."""
        if task.scores is None:
            raise InputError(f"{task.where}: the survey of the dense model has no scores for this unit")
        scores = finite(task.scores.to(task.dense.device), task.where, "weights, or the gradients of the survey,")
        return [Members(members, None) for members in best(scores, kept)]
