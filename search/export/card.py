"""The model card of an export, README.md: what was done, with the metadata that Hugging Face's hub and tools read."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from search.export.check import Checked
from search.report.table import metrics_table
from supernet.space import ATTENTION, BITS, BLOCK, HEADS, MLP, WEIGHTS

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
INHERITED = ("license", "license_name", "license_link", "language")  # from the dense model's own card


@dataclass(frozen=True)
class Facts:
    """What the card says of a run.

    Attributes:
        name: Of the dense model.
        pruner: The method that chose what to remove within a layer.
        strategy: The method that chose how much to remove from each layer.
        rule: Whether that is a rule, which measures no allocations.
        goal: What a search was for: "the smallest ...".
        dtype: Of the weights in the file.
        trust: Whether the folder brings its own modelling code.
        source: The dense model's folder, where there is one.
    """

    name: str
    pruner: str
    strategy: str
    rule: bool
    goal: str
    dtype: str
    trust: bool
    source: Path | None = None


def removed_things(units: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what was pruned."""
    if all(unit["total"] == 1 for unit in units):
        return "whole blocks" if units[0]["kind"] == BLOCK else "attentions, MLPs or mixers as a whole"
    return " and ".join(dict.fromkeys(REMOVED[unit["kind"]] for unit in units))


def model_card(
    facts: Facts, metrics: Mapping[str, Any] | None, allocation: Mapping[str, Any], checked: Checked | None = None
) -> str:
    """Return the README.md of an exported model.

    Args:
        facts: What was done.
        metrics: Content of metrics.json; None where the run has not been evaluated.
        allocation: Content of allocation.json.
        checked: What a fresh process found in the folder; None where it was not checked.
    """
    budget = allocation["budget"]
    removed = 1.0 - budget["achieved"] / budget["dense"]
    option = ", trust_remote_code=True" if facts.trust else ""
    text = f"""# {facts.name}, pruned

{removed:.1%} of {AMOUNTS[budget["kind"]]} of `{facts.name}` were removed ({removed_things(allocation["units"])}).
{_how(facts)}
No weights were trained. The weights are {facts.dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{option})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{option})
```
{TRUST if facts.trust else ""}
{_measured(metrics, checked)}
{_budgets(budget)}

What is kept of each unit (KV groups or query heads of an attention, neurons of an MLP, weights of a layer, bits of a
weight, or 1 for present and 0 for dropped):

{kept_table(allocation["units"])}

Made with {program()}, torch {metadata.version("torch")} and transformers {metadata.version("transformers")}.
"""
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}"


TRUST = """
`trust_remote_code=True` is needed where layers differ in size: `modeling_pruned.py` here builds them. Without it
loading ends with an error. There are classes for causal language models (`AutoModelForCausalLM`) and for their
trunk (`AutoModel`).
"""


def _how(facts: Facts) -> str:
    within = f"What goes within a layer was chosen by `{facts.pruner}`."
    if facts.rule:
        return (
            f"How much goes from each layer follows from the rule `{facts.strategy}`; nothing was searched.\n{within}"
        )
    return f"How much goes from each layer was searched for {facts.goal} (strategy `{facts.strategy}`).\n{within}"


def _measured(metrics: Mapping[str, Any] | None, checked: Checked | None) -> str:
    lines = []
    if metrics is not None:
        tokens = f"{metrics['evaluation_tokens']:,}" if "evaluation_tokens" in metrics else "some"
        lines.append(f"On {tokens} tokens of held-out text:\n\n```\n{metrics_table(metrics)}\n```\n")
    if checked is not None:
        lines.append(
            f"A fresh process loaded this folder and found a loss of {checked.reloaded:.4f} on {checked.sequences} "
            "held-out "
            f"sequences; the run that wrote it had {checked.loss:.4f}.\n"
        )
    return "\n".join(lines)


def _budgets(budget: Mapping[str, Any]) -> str:
    lines = ["Budgets:", ""]
    for limit in (budget, *budget.get("besides", ())):
        rest = limit.get("rest", 0)
        of = "the whole model" if "rest" in limit else "what can be pruned"
        lines.append(
            f"- {limit['kind']} of {of}: at most {limit['target'] + rest:,}, found {limit['achieved'] + rest:,}, dense "
            f"{limit['dense'] + rest:,}"
        )
    return "\n".join(lines)


def _metadata(facts: Facts) -> ModelCardData:
    inherited = _of_source(facts.source)
    tags = ["pruned", "pruning", "sparsity-search"]
    is_hub_id = (
        facts.name.count("/") == 1 and not facts.name.startswith((".", "/", "~")) and not Path(facts.name).exists()
    )
    return ModelCardData(
        base_model=facts.name if is_hub_id else inherited.pop("base_model", None),
        base_model_relation="quantized" if facts.pruner in ("gptq", "rtn") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **{name: value for name, value in inherited.items() if name in INHERITED},
    )


def _of_source(source: Path | None) -> dict[str, Any]:
    """Return the metadata of the dense model's own card; nothing where there is none, or none that can be read."""
    try:
        card = ModelCard.load(source / "README.md", ignore_metadata_errors=True) if source is not None else None
        return {} if card is None else dict(card.data.to_dict())
    except (OSError, ValueError, TypeError):
        return {}


def program() -> str:
    """Return name and version of this program, with its commit where it runs from a checkout."""
    name = "sparsity-search"
    try:
        name += f" {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        pass
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return name
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return name
    return f"{name} (commit {found})"


def kept_table(units: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of what each block keeps: a row for a block, a column for each of its units."""
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
