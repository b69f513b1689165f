"""What a run tells its user: the table at its end, and what it writes of its allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.budgets.budget import Budget
from supernet.space import Allocation, Space

ROWS = ("dense", "uniform", "searched")
SPARSE = 0.99  # share of parameters that are not zero, below which it is told


def allocation_json(space: Space, allocation: Allocation, budget: Budget, model: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of `allocation.json`. A limit's `rest` is what the dense model takes besides its units."""
    units = []
    for unit, level in zip(space.units, allocation, strict=True):
        chosen = unit.levels[level]
        sparsity = round(unit.sparsity(level), 6)
        units.append(
            {
                "name": unit.name,
                "kind": unit.kind,
                "level": level,
                "sparsity": sparsity,
                "kept": chosen.kept,
                "total": unit.total,
            }
            | {"cost": chosen.cost}
        )
    limits = [
        {"kind": limit.kind, "target": limit.target, "dense": limit.dense, "achieved": limit.cost(allocation)}
        | ({} if limit.rest is None else {"rest": limit.rest})  # of the whole model, besides
        for limit in budget.limits
    ]
    amounts = limits[0] | ({"besides": limits[1:]} if len(limits) > 1 else {})
    return {"format": 1, "model": dict(model), "space": space.fingerprint, "budget": amounts, "units": units}


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Show the dense, the uniform and the searched model side by side, a row each.

    `kept` is the share that is left of the prunable parameters, or bits.
    Behind each number that has one stands its standard error over sequences. Where many parameters are zero, those that
    are not are told, too.
    """
    sparse = any(metrics[name]["nonzero_parameters"] < SPARSE * metrics[name]["parameters"] for name in ROWS)
    not_zero = f"{'not zero':>14}" if sparse else ""
    lines = [f"{'':10}{'parameters':>14}{not_zero}{'kept':>9}{'perplexity':>18}{'KL to dense':>20}"]
    for name in ROWS:
        row = metrics[name]
        not_zero = f"{row['nonzero_parameters']:>14,}" if sparse else ""
        perplexity = _with_error(row["perplexity"], row["perplexity_error"], 2)
        divergence = _with_error(row["kl_divergence"], row["kl_divergence_error"], 4)
        lines.append(f"{name:10}{row['parameters']:>14,}{not_zero}{row['kept']:>9.1%}{perplexity:>18}{divergence:>20}")
    lines.append(_gap_line(metrics["searched_minus_uniform"]))
    for name, found in metrics.get("texts", {}).items():
        lines += _further_lines(name, found)
    if "latency" in metrics:
        lines.append(_latency_line(metrics["latency"]))
    return "\n".join(lines)


def _further_lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """The models on a text of another kind, in the columns of the table above."""
    lines = [f"on {found['tokens']:,} tokens of another text, {name}:"]
    for model in ROWS:
        perplexity = _with_error(found[model]["perplexity"], found[model]["perplexity_error"], 2)
        divergence = _with_error(found[model]["kl_divergence"], found[model]["kl_divergence_error"], 4)
        lines.append(f"{model:10}{perplexity:>41}{divergence:>20}")
    return [*lines, _gap_line(found["searched_minus_uniform"])]


def _gap_line(gap: Mapping[str, Any]) -> str:
    apart = _with_error(gap["kl_divergence"], gap["kl_divergence_error"], 4, sign="+")
    return f"searched - uniform, on the same sequences: KL {apart}"


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """Format a number with its standard error, where there is one: 14.05 ± 0.31. What rounds to 0 has no sign (`z`)."""
    return f"{value:{sign}z.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _latency_line(latency: Mapping[str, Any]) -> str:
    tokens = f"{latency['batch']} x {latency['prompt']}" + (
        f" + {latency['generated']}" if latency["generated"] else ""
    )
    taken = f"{latency['searched_seconds']:.3g} instead of {latency['dense_seconds']:.3g} s for {tokens} tokens"
    expected = f"{latency['asked']:.2f} asked for, {latency['promised']:.2f} expected"
    return f"{latency['speedup']:.2f} times as fast as dense ({expected}): {taken} on {latency['device']}"
