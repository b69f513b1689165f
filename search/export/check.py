"""The guard of the export: what a fresh process loads from the folder computes what the run measured, or the run fails.

Three numbers must agree on a few held-out sequences: the loss that the search's own way of measuring gives for the
allocation, that of the assembled model in memory, and that of the folder in a process that knows nothing of this
project.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import supernet
from search.export import reload
from supernet.errors import InputError
from supernet.models.architecture import parameter_count
from supernet.models.modeling_pruned import PrunedMixin

log = logging.getLogger(__name__)

SEQUENCES = 4
LONGEST = 7200  # seconds that loading and four sequences may take; a model of 70B from a slow disk takes minutes


@dataclass(frozen=True)
class Sample:
    """A few held-out sequences and what the search's own way of measuring says of them.

    Attributes:
        ids: (sequences, tokens) int64.
        unscored: First positions of each that do not count.
        losses: Of the allocation, a number a sequence; empty where nothing else measured it.
        rounded: Whether the weights that are exported were rounded since.
    """

    ids: Tensor
    unscored: int = 0
    losses: Sequence[float] = ()
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class Checked:
    """What the check found, as `metrics.json` has it.

    Attributes:
        sequences: That were compared.
        loss: Their mean loss in memory.
        reloaded: The same of the folder in a fresh process.
        largest_difference: Between the two, of any sequence.
        tolerance: What the difference may be, relative to a loss (or to 1 where that is more).
    """

    sequences: int
    loss: float
    reloaded: float
    largest_difference: float
    tolerance: float


def tolerance(*dtypes: torch.dtype) -> float:
    """Return how much two losses of one model may differ, relatively: the coarsest dtype's rounding, at least 1e-4."""
    return max(1e-4, *(torch.finfo(dtype).eps for dtype in dtypes))


def check_assembled(model: PreTrainedModel, sample: Sample) -> list[float]:
    """Return the losses of the model in memory; InputError where the search's way of measuring gave others.

    The two ways add up in another order, and weights may have been rounded between them, hence four times the
    tolerance.
    """
    losses = reload.sequence_losses(model, sample.ids, sample.unscored)
    if sample.losses:
        allowed = 4 * tolerance(model.dtype, sample.rounded or model.dtype)
        worst = _worst(losses, sample.losses)
        if not _agree(losses, sample.losses, allowed):
            raise InputError(
                f"the assembled model's loss differs by {worst:.3g} from what the search measured ({_mean(losses):.4g} "
                f"and {_mean(sample.losses):.4g}); nothing was exported: this is a fault of this program, please "
                "report it with the model's config.json"
            )
    return losses


def check_folder(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype, losses: Sequence[float], sample: Sample
) -> Checked:
    """Load a folder in a fresh process and compare; InputError where that fails or gives another model.

    Args:
        folder: What was written.
        model: The one in memory; its weights may have been cast since.
        dtype: That the losses were computed in.
        losses: Of the model in memory.
        sample: What they are of.
    """
    found = _reload(folder, model, dtype, sample)
    allowed, parameters = tolerance(dtype), parameter_count(model)
    if found["parameters"] != parameters or not _agree(losses, found["losses"], allowed):
        raise InputError(
            f"what a fresh process loads from the export is another model: loss {_mean(found['losses']):.4g} and "
            f"{found['parameters']:,} parameters, in memory {_mean(losses):.4g} and {parameters:,}; nothing was "
            "exported: this is a fault of this program, please report it with the model's config.json"
        )
    if not all(map(math.isfinite, losses)):
        log.warning("the loss of what is exported is not finite; use dtype=float32, or ask for less")
    worst = _worst(losses, found["losses"])
    return Checked(len(losses), _mean(losses), _mean(found["losses"]), worst, allowed)


def _reload(folder: Path, model: PreTrainedModel, dtype: torch.dtype, sample: Sample) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="export-check-") as name:
        place = Path(name)
        save_file({"ids": sample.ids.cpu().contiguous()}, place / "ids.safetensors")
        request = {
            "folder": str(folder.absolute()),
            "ids": str(place / "ids.safetensors"),
            "result": str(place / "result.json"),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(model.device),
            "trust": isinstance(model, PrunedMixin),
            "unscored": sample.unscored,
        }
        (place / "request.json").write_text(json.dumps(request))
        try:
            process = subprocess.run(
                [sys.executable, "-P", reload.__file__, str(place / "request.json")],
                cwd=place,
                env=_environment(place),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"a fresh process has not loaded the export within {LONGEST // 60} minutes; nothing was exported: use "
                "export.check=false, and look at what keeps it"
            ) from error
        if process.returncode:
            said = (process.stderr.strip() or f"status {process.returncode}").splitlines()[-1]
            raise InputError(
                f"a fresh process cannot load the export ({said}); nothing was exported: with too little memory for "
                "one model more, use export.check=false; else please report it with the model's config.json"
            )
        found: dict[str, Any] = json.loads((place / "result.json").read_text())
        return found


def _environment(place: Path) -> dict[str, str]:
    """Return this process's environment without a way to the hub, or to our own modules unless they are installed."""
    own = Path(supernet.__file__).resolve().parents[1]
    ways = [way for way in sys.path if way and (Path(way).resolve() != own or (own / "transformers").is_dir())]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(ways),
        # what transformers copies to run code from the folder goes with the check
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def _agree(ours: Sequence[float], others: Sequence[float], allowed: float) -> bool:
    if len(ours) != len(others):
        return False
    for one, other in zip(ours, others, strict=True):
        if not math.isfinite(one) or not math.isfinite(other):
            if repr(one) != repr(other):
                return False
        elif abs(one - other) > allowed * max(1.0, abs(one)):
            return False
    return True


def _worst(ours: Sequence[float], others: Sequence[float]) -> float:
    return max((abs(one - other) for one, other in zip(ours, others, strict=True) if one != other), default=0.0)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
