"""What a run tells its user: the table at its end, and the card of the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search.budget import Budget
from supernet.space import Allocation, Space

ROWS = ("dense", "uniform", "searched")


def allocation_json(space: Space, allocation: Allocation, budget: Budget, model: Mapping[str, str]) -> dict[str, Any]:
    """The content of `allocation.json`."""
    units = []
    for unit, level in zip(space.units, allocation, strict=True):
        chosen = unit.levels[level]
        sparsity = round(unit.sparsity(level), 6)
        units.append(
            {"name": unit.name, "kind": unit.kind, "level": level, "sparsity": sparsity, "kept": chosen.kept, "total": unit.total}
            | {"cost": chosen.cost}
        )
    achieved = space.cost(allocation)
    amounts = {"kind": budget.kind, "target": budget.target, "dense": budget.dense, "achieved": achieved}
    return {"format": 1, "model": dict(model), "space": space.fingerprint, "budget": amounts, "units": units}


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Dense, uniform and searched model side by side."""
    lines = [f"{'':10}{'parameters':>14}{'perplexity':>13}{'KL to dense':>14}"]
    for name in ROWS:
        row = metrics[name]
        lines.append(f"{name:10}{row['parameters']:>14,}{row['perplexity']:>13.2f}{row['kl_divergence']:>14.4f}")
    return "\n".join(lines)


def model_card(name: str, metrics: Mapping[str, Any] | None, allocation: Mapping[str, Any]) -> str:
    """README.md of an exported model; without the table where the run has not been evaluated."""
    budget = allocation["budget"]
    removed = 1.0 - budget["achieved"] / budget["dense"]
    measured = "" if metrics is None else f"On held-out text:\n\n```\n{metrics_table(metrics)}\n```\n"
    return f"""# {name}, pruned

{removed:.1%} of the prunable parameters (attention heads and MLP neurons) of `{name}` were removed, each layer by its own
amount: the allocation was searched for the smallest KL divergence to the unpruned model. No weights were trained.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

`trust_remote_code=True` is needed where layers differ in size (`modeling_pruned.py` here builds them); without it the weights
do not fit, or some are left random.

{measured}
Kept members per layer (KV groups of the attention, neurons of the MLP):

{kept_table(allocation["units"])}
"""


def kept_table(units: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table of what each block keeps."""
    lines = ["| block | attention | mlp |", "|---|---|---|"]
    for index in range(0, len(units), 2):
        attention, mlp = units[index], units[index + 1]
        lines.append(f"| {index // 2} | {attention['kept']} of {attention['total']} | {mlp['kept']} of {mlp['total']} |")
    return "\n".join(lines)
