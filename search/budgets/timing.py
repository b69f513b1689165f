"""How long one model takes on the user's device, timed in turns with another so that work of others slows both."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FEWEST, MOST, ENOUGH = 5, 30, 1.0  # repetitions, and the seconds of them after which the fewest will do
BUSY = 1.5  # times as long as before the dense model may take until the user is told
STEPS = 8  # decoded tokens that are timed in a repetition


@dataclass(frozen=True)
class Request:
    """The work that is timed: `batch` sequences of `prompt` tokens at once, then `generated` tokens of each, one by
    one.
    """

    batch: int = 1
    prompt: int = 512
    generated: int = 0


@dataclass(frozen=True)
class Seconds:
    """The time for the prompt, and for each generated token."""

    prefill: float
    decode: float

    def total(self, request: Request) -> float:
        """Return the time of a whole request."""
        return self.prefill + request.generated * self.decode


Timer = Callable[[PreTrainedModel, Tensor, int], Seconds]


@torch.no_grad()
def time_once(model: PreTrainedModel, ids: Tensor, generated: int) -> Seconds:
    """Time one forward pass over the prompt and, where tokens are to be generated, a few steps with its cache."""
    start = _now(ids)
    output: Any = model(input_ids=ids, use_cache=generated > 0, logits_to_keep=1)
    middle = _now(ids)
    steps = min(generated, STEPS)
    if not steps:
        return Seconds(middle - start, 0.0)
    name = "cache_params" if "cache_params" in output else "past_key_values"
    for _ in range(steps):
        output = model(input_ids=ids[:, -1:], use_cache=True, **{name: output[name]})
    return Seconds(middle - start, (_now(ids) - middle) / steps)


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def compare(
    dense: PreTrainedModel, other: PreTrainedModel, request: Request, timer: Timer = time_once
) -> tuple[Seconds, Seconds]:
    """Return the times of the dense model, and those of the other one as shares of them: medians over repetitions.

    The two passes of a repetition lie side by side, so that work of others on the machine slows both.
    """
    ids = torch.zeros(request.batch, request.prompt, dtype=torch.int64, device=dense.device)
    for model in (dense, other):  # buffers, kernels and caches: a first pass is always slower
        timer(model, ids, request.generated)
    taken: list[Seconds] = []
    shares: list[Seconds] = []
    spent = 0.0
    while len(taken) < MOST and (len(taken) < FEWEST or spent < ENOUGH):
        pair = (dense, other) if len(taken) % 2 == 0 else (other, dense)
        first, second = (timer(model, ids, request.generated) for model in pair)
        ours, its = (first, second) if pair[0] is dense else (second, first)
        taken.append(ours)
        decode = its.decode / ours.decode if ours.decode else 1.0
        shares.append(Seconds(its.prefill / ours.prefill, decode))
        spent += sum(one.prefill + min(request.generated, STEPS) * one.decode for one in (first, second))
    return _median(taken), _median(shares)


def _median(found: Sequence[Seconds]) -> Seconds:
    return Seconds(median(one.prefill for one in found), median(one.decode for one in found))


def speedup(
    dense: PreTrainedModel, pruned: PreTrainedModel, request: Request, timer: Timer = time_once
) -> dict[str, Any]:
    """Return how much faster a pruned model is than the dense one, as `metrics.json` has it."""
    taken, share = compare(dense, pruned, request, timer)
    pruned_seconds = Seconds(taken.prefill * share.prefill, taken.decode * share.decode).total(request)
    of_dense = taken.total(request)
    return machine(dense.device) | {
        **asdict(request),
        "dense_seconds": round(of_dense, 6),
        "searched_seconds": round(pruned_seconds, 6),
        "speedup": round(of_dense / pruned_seconds, 4),
    }


def warn_if_busy(seen: Sequence[float], remedy: str = "") -> None:
    """Tell the user where the dense model took very different times from one moment to another."""
    if seen and max(seen) > BUSY * min(seen):
        found = f"the dense model took between {min(seen):.3g} and {max(seen):.3g} s"
        log.warning("latency: %s: other work on this machine may have spoilt the measurements%s", found, remedy)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what timings depend on besides the model: the machine, its processor, and the threads."""
    if device.type == "cuda":
        return {"machine": platform.node(), "device": torch.cuda.get_device_name(device)}
    return {"machine": platform.node(), "device": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
