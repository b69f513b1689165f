"""A sliced sub-block computes what the dense one does with zeros, and a candidate holds nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.architecture import entry, sub_blocks
from supernet.encoding import Candidate, encode, member_columns, sliced
from supernet.store import Supernet


@pytest.mark.parametrize(
    ("kept", "width", "columns"),
    [
        ([0, 2, 5], 1, [0, 2, 5]),
        ([1, 3], 3, [3, 4, 5, 9, 10, 11]),
        ([], 4, []),
    ],
)
def test_member_columns(kept: list[int], width: int, columns: list[int]) -> None:
    found = member_columns(torch.tensor(kept, dtype=torch.int64), width)
    assert found.tolist() == columns
    assert found.dtype == torch.int64


def test_encoded_are_kept_members_and_their_columns_alone() -> None:
    weight = torch.arange(12.0).view(4, 3).T  # not contiguous
    tensors = encode({1: Candidate(torch.tensor([0, 1, 4, 7]), weight), 2: Candidate(torch.tensor([4]), weight[:, 2:3])})
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "1.kept": (4,),
        "1.weight": (3, 4),
        "2.kept": (1,),
        "2.weight": (3, 1),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["1.weight"], weight)


@torch.no_grad()
def test_sliced_equals_dense_with_zeros(
    family_model: PreTrainedModel,
    ids: Tensor,
    family_supernet: Supernet,
    with_zeros: Callable[..., PreTrainedModel],
) -> None:
    hidden, contexts = entry(family_model, ids)
    for level in (1, 2):
        zeroed = with_zeros(family_model, family_supernet, [level] * len(family_supernet.space.units))
        for index, (part, reference) in enumerate(zip(sub_blocks(family_model), sub_blocks(zeroed), strict=True)):
            candidate = family_supernet.candidate(index, level)
            weights = sliced(part, candidate)
            context = contexts[part.block]
            torch.testing.assert_close(part(hidden, context, weights), reference(hidden, context), rtol=1e-4, atol=1e-5)
            removed = sum(dict(part.module.named_parameters())[name].numel() - w.numel() for name, w in weights.items())
            assert removed == (part.members - len(candidate.kept)) * part.member_parameters


def test_slicing_leaves_the_model_as_it_was(family_model: PreTrainedModel, family_supernet: Supernet) -> None:
    before = copy.deepcopy(family_model.state_dict())
    for index, part in enumerate(sub_blocks(family_model)):
        for tensor in sliced(part, family_supernet.candidate(index, 1)).values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in family_model.state_dict().items())
