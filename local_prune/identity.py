"""Records what candidates depend on, for the fingerprint of a supernet: all that changes them, and nothing else.

The caller adds the fingerprints of the model and of the text; everything else that a build is given is recorded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, Pruner
from local_prune.walk import VERSION, Mixture, fit_of
from supernet.models.architecture import sub_blocks
from supernet.space import Space

# Settings that only decide which levels there are: the space says that already.
OF_THE_SPACE = ("multiple", "query_heads")


def build_record(
    model: PreTrainedModel,
    calibration: Calibration,
    pruner: Pruner,
    space: Space,
    mixture: Mixture,
    device: torch.device,
) -> dict[str, Any]:
    """Return a JSON-able record of what candidates depend on besides the dense model and the text.

    The arguments are those of `local_prune.walk.build`. Of a library's version the first two parts count: kernels, and
    with them rounding and ties, change from one minor release of torch to the next, whereas patches mend single faults.
    transformers computes the activations, so its version counts where text is read. The number of sequences in a
    forward pass (`prune.batch`) and the index of a device change no more than the last bits, and are left out.
    """
    record = {
        "walk": VERSION,
        "pruner": identity_of(pruner),
        "device": device.type,
        "torch": _release(torch.__version__),
    }
    if reads_text(model, calibration, pruner):
        record["transformers"] = _release(transformers.__version__)
    if _sees_inputs(model, pruner):
        record["fit"] = fit_of(model, calibration, pruner, space, mixture)[0]
        record["mixture"] = {name: [float(weight) for weight in weights] for name, weights in mixture.items()}
    return record


def identity_of(pruner: Pruner) -> dict[str, Any]:
    """Return a JSON-able record of a pruner: its name, its version, and the settings that change candidates.

    Settings of the type float are written as floats, so that 1 and 1.0 are one value. Sequences are written as lists,
    whatever the configuration made of them.
    """
    given: list[Field[Any]] = (
        [one for one in fields(pruner) if one.name not in OF_THE_SPACE] if is_dataclass(pruner) else []
    )
    settings = {one.name: _plain(getattr(pruner, one.name), one.type) for one in given}
    return {"name": pruner.name, "version": pruner.version, "settings": settings}


def reads_text(model: PreTrainedModel, calibration: Calibration, pruner: Pruner) -> bool:
    """Return whether candidates depend on the calibration text.

    They do if the method surveys the dense model, or if it looks at the inputs of layers.
    """
    return pruner.survey_tokens(calibration) > 0 or _sees_inputs(model, pruner)


def _sees_inputs(model: PreTrainedModel, pruner: Pruner) -> bool:
    part = sub_blocks(model)[0]
    return pruner.statistics(part.weight(part.column), 1) is not None


def _plain(value: Any, kind: Any) -> Any:
    if kind in ("float", float):
        return float(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])
