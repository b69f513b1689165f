"""What structured methods share that choose members (KV groups, query heads, neurons).

That is: their units, sums over the parameters of a member, and candidates from a score of each member. Members with the
lowest scores go first, and the weights of the others stay as they are. One order serves all levels, so that they are
nested.
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
        part: A sub-block with members.
        matrices: The quantity of each weight, (d_out, d_in), for each of the `member_layers`.
        biases: The quantity of each bias, (d_out,), for those that lose rows and have one.

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
    """The members with the highest scores, for each number in `kept`; among equal ones the first stay.

    Args:
        scores: (members,).
        kept: How many stay at each level.

    Returns:
        For each level the members, (k,) int64, rising.
    """
    ranking = scores.argsort(descending=True, stable=True)
    return [ranking[:count].sort().values for count in kept]


@dataclass(frozen=True)
class MembersPruner(NoSurvey):
    """What all structured methods have in common: the settings that decide which units and levels there are.

    Attributes:
        multiple: Kept neurons are multiples of this.
        query_heads: Take single query heads (Týr-the-Pruner) instead of KV groups.
    """

    multiple: int = 32
    query_heads: bool = False

    def prunables(self, parts: Sequence[SubBlock]) -> tuple[Prunable, ...]:
        """The members of every sub-block that has some."""
        return member_prunables(parts, self.multiple, self.query_heads)

    def parts(self, model: PreTrainedModel) -> tuple[SubBlock, ...]:
        """The model's sub-blocks, with the members that are asked for."""
        return by_query_heads(sub_blocks(model)) if self.query_heads else sub_blocks(model)


@dataclass(frozen=True)
class ScoredMembersPruner(MembersPruner):
    """A method that keeps the members with the highest scores, with their dense weights.

    A subclass says what the scores are.
    """

    def scores(self, task: Task) -> Tensor:
        """What each member is worth, (members,); InputError where that is not finite."""
        raise NotImplementedError

    def bias(self, task: Task, kept: Tensor) -> Tensor | None:
        """The bias (d_out,) of a candidate that keeps these members (k,); None, the default, where it has none of its
        own.
        """
        return None

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One candidate a level, without weights."""
        return [Members(members, None, self.bias(task, members)) for members in best(self.scores(task), kept)]


@dataclass(frozen=True)
class SurveyedPruner(ScoredMembersPruner):
    """A method whose scores all come from its survey."""

    def statistics(self, dense: Tensor, width: int) -> None:
        """None, as the inputs in the pruned model play no part."""

    def scores(self, task: Task) -> Tensor:
        """What the survey found for the unit."""
        if task.scores is None:
            raise InputError(f"{task.where}: the survey of the dense model has no scores for this unit")
        return finite(task.scores.to(task.dense.device), task.where, "weights, or the gradients of the survey,")
