"""What a run warns its user of: a model that is no faster, or no better, than it should be."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

MISSED = 0.05  # of the speed-up asked for


def warn_if_missed(latency: Mapping[str, Any]) -> None:
    """Tell the user where the model is clearly not as fast as was asked for."""
    if latency["speedup"] < (1.0 - MISSED) * latency["asked"]:
        why = (
            "other work on this machine may have spoilt one of the measurements; ask for more, or measure again when "
            "it is idle"
        )
        log.warning(
            "the model is %.2f times as fast, not %g times as asked: %s", latency["speedup"], latency["asked"], why
        )


def warn_if_worse(metrics: Mapping[str, Any], rule: bool) -> None:
    """Warn where the allocation found, by a rule or a search, is worse than the uniform one by more than chance.

    That is by more than the standard error of the difference on the same sequences; one sequence proves nothing.
    """
    searched, even = (metrics[name]["kl_divergence"] for name in ("searched", "uniform"))
    gap = metrics["searched_minus_uniform"]
    error = gap["kl_divergence_error"]
    lost = math.isfinite(even) and not math.isfinite(searched)
    if lost or (error is not None and gap["kl_divergence"] > error):
        longer = "search longer (strategy.generations), or on more text (data.sequences.search)"
        advice = "use another strategy, such as guided" if rule else longer
        log.warning(
            "the model found is further from the dense one than the uniform one (KL %g and %g): %s",
            searched,
            even,
            advice,
        )
