"""The definition of pruning, which everything in this folder is compared with."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from supernet.architecture import SubBlock, sub_blocks
from supernet.encoding import Candidate, member_columns
from supernet.store import Supernet


def zero_removed(part: SubBlock, candidate: Candidate) -> None:
    """What removed members would have put into the projection counts for nothing; without members nothing comes out."""
    weight = torch.zeros_like(part.projection.weight)
    weight[:, member_columns(candidate.kept, part.width)] = candidate.weight
    part.projection.weight.data = weight
    if not len(candidate.kept) and part.projection.bias is not None:
        part.projection.bias.data = torch.zeros_like(part.projection.bias)


def model_with_zeros(model: PreTrainedModel, supernet: Supernet, allocation: Sequence[int]) -> PreTrainedModel:
    """A copy of the dense model with an allocation's candidates written into zeroed projections."""
    zeroed = copy.deepcopy(model)
    for index, (part, level) in enumerate(zip(sub_blocks(zeroed), allocation, strict=True)):
        if level:
            zero_removed(part, supernet.candidate(index, level))
    return zeroed


@pytest.fixture(scope="session")
def with_zeros() -> Callable[[PreTrainedModel, Supernet, Sequence[int]], PreTrainedModel]:
    return model_with_zeros
