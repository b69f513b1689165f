"""What the settings `budget.*` ask for, as limits on allocations: one for each of them that is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from search.budgets import costs
from search.budgets.budget import Budget, Limit
from search.budgets.costs import CostTable
from search.budgets.latency import check_faster
from search.budgets.settings import DETAILS, given_limits
from search.budgets.timing import Request
from search.values import read_bytes
from supernet.errors import InputError
from supernet.models.assemble import slices_query_heads
from supernet.models.families import family_of
from supernet.space import BITS, HEADS, WEIGHTS, Space

Latencies = Callable[[Space], CostTable]  # measured, in nanoseconds


def request_of(budget: Mapping[str, Any]) -> Request:
    """Return the request whose latency is measured, from the settings."""
    return Request(**{name: budget[name] for name in DETAILS["speedup"] if name in budget})


def make_budget(
    budget: Mapping[str, Any],
    model: PreTrainedModel,
    space: Space,
    latencies: Latencies,
    dtype: torch.dtype | None = None,
) -> Budget:
    """Return the limits that the settings give.

    Args:
        budget: The settings.
        model: The dense model.
        space: Units and levels.
        latencies: Measures what they take.
        dtype: Of the weights in the exported file; the model's own where none is given.
    """
    limits = []
    for name, value in given_limits(budget).items():
        said = f"budget.{name}={value}"
        _check_told(name, said, model, space)
        if name in ("sparsity", "bits"):
            limits.append(_of_share(name, value, space))
        elif name == "speedup":
            check_faster(space, said)
            limits.append(_of_speedup(said, float(value), latencies(space), space))
        elif name == "bytes":
            size = read_bytes(said.partition("=")[0], value) or 0
            limits.append(_of_whole(name, said, size, costs.size(model, space, dtype or model.dtype), space))
        else:
            table = (
                costs.flops(model, space, budget["sequence_length"])
                if name == "flops"
                else costs.parameters(model, space)
            )
            limits.append(_of_whole(name, said, value, table, space))
    return Budget(tuple(limits))


def _check_told(name: str, said: str, model: PreTrainedModel, space: Space) -> None:
    """InputError for a limit on the whole model that would promise what the exported file does not have."""
    if name not in ("parameters", "bytes", "flops"):
        return
    if _counts_bits(space):
        what = f"fewer bits leave {name} as they are"
        if name == "bytes":
            what = "every weight is written at full width, on its coarse grid"
        raise InputError(f"{said}: {what}; use budget.bits or budget.sparsity")
    kinds = {unit.kind for unit in space.units}
    if name == "bytes" and WEIGHTS in kinds:
        raise InputError(
            f"{said}: single weights that are zero are written all the same; use budget.sparsity or budget.parameters, "
            "or a method that makes layers smaller, such as prune=obs or prune=depth"
        )
    if HEADS in kinds and not slices_query_heads(family_of(model)):
        raise InputError(
            f"{said}: single query heads of '{model.config.model_type}' are set to zero and stay in the file; use "
            "budget.sparsity, or prune.query_heads=false"
        )


def _counts_bits(space: Space) -> bool:
    return space.units[0].kind == BITS


def _of_share(name: str, value: float, space: Space) -> Limit:
    """Return a limit on a fraction of what the space itself counts, or on the average bit width."""
    if name == "sparsity":
        return Budget.from_sparsity(value, space, "bits" if _counts_bits(space) else "parameters").first
    if not _counts_bits(space):
        raise InputError(f"budget.bits={value} is for bit widths; use budget=parameters, or prune=gptq or prune=rtn")
    dense = space.units[0].total
    if not 0 < value < dense:
        raise InputError(f"budget.bits={value} must lie between 0 and the {dense} bits of a dense weight")
    return Budget.from_sparsity(1.0 - value / dense, space, "bits").first


def _of_whole(kind: str, said: str, value: float, table: CostTable, space: Space) -> Limit:
    """Return a limit on what the whole model may have; InputError where the units cannot make up for the rest."""
    if not value < table.dense:
        raise InputError(f"{said} is no less than the {table.dense:,} {kind} of the dense model; ask for fewer")
    if value < table.rest:
        raise InputError(
            f"{said} is below the {table.rest:,} {kind} of what is not pruned (embeddings, norms, head, ...); the "
            f"pruned model can have {table.lowest:,} to {table.dense:,}"
        )
    if value < table.lowest:
        raise InputError(
            f"{said} cannot be met: with all units at their highest level {table.lowest:,} {kind} are left; "
            f"{_remedy(space)}"
        )
    return Limit(kind, int(value) - table.rest, table.dense - table.rest, table.costs, rest=table.rest)


def _of_speedup(said: str, value: float, table: CostTable, space: Space) -> Limit:
    """Return a limit on the latency of the whole model; InputError where even the sparsest one is slower."""
    target = int(table.dense / value) - table.rest
    if target < table.lowest - table.rest:
        fastest = table.dense / max(1, table.lowest)
        raise InputError(
            f"{said} cannot be met: with all units at their highest level the model is measured {fastest:.3g} times as "
            f"fast; {_remedy(space)}"
        )
    # Timings are not known better than that, and the smallest of their differences would be a step that nothing can
    # meet.
    return Limit("latency", target, table.dense - table.rest, table.costs, slack=table.dense // 500, rest=table.rest)


def _remedy(space: Space) -> str:
    if _counts_bits(space):
        return "raise it, or add widths to prune.pruner.bits"
    return "ask for less, or raise supernet.levels or supernet.step (with prune.pruner.pattern, add a sparser one)"
