"""The last words of a run: what to look at in its table, a taste of each model, and how to go on."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 118


def reading(metrics: Mapping[str, Any]) -> str:
    """Say in one sentence what the table's last columns mean for this run.

    The search is worth what it takes off the uniform allocation's distance to the dense model, on the same sequences;
    a difference within two standard errors may be chance.

    Args:
        metrics: The content of `metrics.json`.
    """
    gap = metrics["searched_minus_uniform"]
    change, error = gap["kl_divergence"], gap["kl_divergence_error"]
    uniform = metrics["uniform"]["kl_divergence"]
    look = "Look at the KL divergence: how far a model's predictions are from the dense model's (0 is the same)."
    if error is None or uniform <= 0.0 or abs(change) <= 2.0 * error:
        verdict = "The searched and the uniform allocation are too close to tell them apart on so little text."
    elif change < 0:
        verdict = f"At the same size, the searched allocation is {-change / uniform:.0%} nearer than the uniform one."
    else:
        verdict = f"The searched allocation is {change / uniform:.0%} further away than the uniform one."
    return f"{look} {verdict}"


def tasted(continuations: Mapping[str, str]) -> str:
    """Return the prompt and how each model goes on with it, a line or a few for each.

    Args:
        continuations: "prompt", and for each model (dense, uniform, searched) the text that it wrote.
    """
    lines = [f'How each goes on with "{continuations["prompt"]}":']
    for name, text in continuations.items():
        if name != "prompt":
            # A model may write anything, also what a terminal would take for commands.
            shown = "".join(one if one.isprintable() else "?" for one in " ".join(text.split())) or "(nothing)"
            lines += textwrap.wrap(shown, WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10)
    return "\n".join(lines)


NEXT = "For your own model: python -m search model=PATH_OR_HUB_ID budget.sparsity=0.25 (dry_run=true tells the cost)"
