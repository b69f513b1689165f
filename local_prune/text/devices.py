"""Lends modules, and the arguments that blocks take, to the device that does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Lend a module to the device, and put it back as it was; what has become of it on the device is thrown away."""
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:  # already here, as the device may have too little memory for all of them
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def moved(contexts: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the arguments of blocks, as `entry` gives them, on another device.

    Masks and rotary tables that blocks share are moved once, and are shared there, too.
    """
    known: dict[
        int, Tensor
    ] = {}  # by id: `contexts` keeps the tensors alive meanwhile, so that no other takes their place

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = value.to(device)
            return known[id(value)]
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return [{key: move(value) for key, value in context.items()} for context in contexts]
