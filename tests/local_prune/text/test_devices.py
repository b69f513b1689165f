"""What is lent to a device comes back as it was, also where there was no room for it."""

import pytest
import torch
from torch import nn

from local_prune.text.devices import on_device


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_lent_parameters_come_back_themselves(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data_ptr() for tensor in tensors]
    left = room

    def copied(tensor: torch.Tensor, _: object) -> torch.Tensor:
        nonlocal left
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left -= 1
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    if room < len(tensors):
        with pytest.raises(torch.OutOfMemoryError), on_device(module, torch.device("cpu")):
            pytest.fail("there is no room")
    else:
        with on_device(module, torch.device("cpu")):
            assert all(tensor.data_ptr() != home for tensor, home in zip(tensors, homes, strict=True))
    assert [tensor.data_ptr() for tensor in tensors] == homes
