"""What a run tells its user: the table at its end, and the card of the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search.budget import Budget
from supernet.architecture import ATTENTION, MLP
from supernet.prunables import BITS, BLOCK, HEADS, WEIGHTS
from supernet.space import Allocation, Space

ROWS = ("dense", "uniform", "searched")


def allocation_json(space: Space, allocation: Allocation, budget: Budget, model: Mapping[str, str]) -> dict[str, Any]:
    """The content of `allocation.json`; a limit's `rest` is what the whole dense model takes besides its units."""
    units = []
    for unit, level in zip(space.units, allocation, strict=True):
        chosen = unit.levels[level]
        sparsity = round(unit.sparsity(level), 6)
        units.append(
            {"name": unit.name, "kind": unit.kind, "level": level, "sparsity": sparsity, "kept": chosen.kept, "total": unit.total}
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
    """Dense, uniform and searched model side by side; `kept` is the share of the prunable parameters, or bits, that is left."""
    lines = [f"{'':10}{'parameters':>14}{'kept':>9}{'perplexity':>13}{'KL to dense':>14}"]
    for name in ROWS:
        row = metrics[name]
        lines.append(
            f"{name:10}{row['parameters']:>14,}{row['kept']:>9.1%}{row['perplexity']:>13.2f}{row['kl_divergence']:>14.4f}"
        )
    if "latency" in metrics:
        lines.append(_latency_line(metrics["latency"]))
    return "\n".join(lines)


def _latency_line(latency: Mapping[str, Any]) -> str:
    tokens = f"{latency['batch']} x {latency['prompt']}" + (f" + {latency['generated']}" if latency["generated"] else "")
    taken = f"{latency['searched_seconds']:.3g} instead of {latency['dense_seconds']:.3g} s for {tokens} tokens"
    asked = f"{latency['asked']:.2f} asked for, " if "asked" in latency else ""  # a run of an earlier version did not say
    expected = f"{asked}{latency['promised']:.2f} expected"
    return f"{latency['speedup']:.2f} times as fast as dense ({expected}): {taken} on {latency['device']}"


REMOVED = {
    ATTENTION: "attention heads",
    HEADS: "attention heads",
    MLP: "MLP neurons",
    WEIGHTS: "single weights, which are zero now",
    BITS: "bits of the linear layers' weights, which lie on coarse grids now",
    BLOCK: "whole blocks",
}


AMOUNTS = {kind: f"the prunable {kind}" for kind in ("parameters", "bits", "bytes")} | {
    "flops": "the FLOPs of the prunable layers",
    "latency": "the time that the prunable layers take",
}


def removed_things(units: Sequence[Mapping[str, Any]]) -> str:
    """What was pruned, in words."""
    if all(unit["total"] == 1 for unit in units):
        return "whole blocks" if units[0]["kind"] == BLOCK else "attentions, MLPs or mixers as a whole"
    return " and ".join(dict.fromkeys(REMOVED[unit["kind"]] for unit in units))


def model_card(name: str, metrics: Mapping[str, Any] | None, allocation: Mapping[str, Any], trust: bool) -> str:
    """README.md of an exported model.

    Args:
        name: Of the dense model.
        metrics: Content of metrics.json; None where the run has not been evaluated.
        allocation: Content of allocation.json.
        trust: Whether the folder brings its own modelling code.
    """
    budget = allocation["budget"]
    removed = 1.0 - budget["achieved"] / budget["dense"]
    measured = "" if metrics is None else f"On held-out text:\n\n```\n{metrics_table(metrics)}\n```\n"
    option = ", trust_remote_code=True" if trust else ""
    reason = """
`trust_remote_code=True` is needed where layers differ in size (`modeling_pruned.py` here builds them); without it the weights
do not fit, or some are left random.
"""
    return f"""# {name}, pruned

{removed:.1%} of {AMOUNTS[budget["kind"]]} of `{name}` were removed ({removed_things(allocation["units"])}),
from each layer its own amount: the allocation was searched for the smallest KL divergence to the unpruned model. No weights were
trained.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{option})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{reason if trust else ""}
{measured}
What is kept of each unit (KV groups or query heads of an attention, neurons of an MLP, weights of a layer, bits of a weight, or 1
for present and 0 for dropped):

{kept_table(allocation["units"])}
"""


def kept_table(units: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table of what each block keeps: a row a block, a column for each of its units."""
    rows: dict[str, dict[str, str]] = {}
    for unit in units:
        words = unit["name"].split(".")
        at = max(index for index, word in enumerate(words) if word.isdigit())
        column = ".".join(words[at + 1 :]) or "block"
        rows.setdefault(words[at], {})[column] = f"{unit['kept']:,} of {unit['total']:,}"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| block | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {block} | {' | '.join(row.get(column, '') for column in columns)} |" for block, row in rows.items()]
    return "\n".join(lines)
