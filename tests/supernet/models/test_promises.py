"""What budgets promise is what the exported file has: every kind of unit by every limit on the whole model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from search.budgets import costs
from search.budgets.costs import CostTable
from search.budgets.from_settings import make_budget
from search.export.rounding import rounded
from supernet.errors import InputError
from supernet.models.assemble import assemble
from supernet.space import Space
from supernet.store import Supernet
from tests.exports import export

pytestmark = pytest.mark.usefixtures("remote_code_stays_here")

Allocation = tuple[int, ...]
TOKENS = 5  # no more than a sliding window holds
REFUSED = {  # by kind of unit: limits that would promise what the file does not have
    "weights": ("bytes",),
    "bits": ("parameters", "bytes", "flops"),
    "query heads of gpt2": ("parameters", "bytes", "flops"),
}
CASES = [
    (name, kind) for name in ("llama_with_biases", "gemma3") for kind in ("members", "query heads", "weights", "bits")
]
CASES += [
    ("qwen2", "blocks"),
    ("gpt2", "members"),
    ("gpt2", "query heads"),
    ("gpt2", "sub-blocks"),
    ("llama", "sub-blocks"),
]


class NoTokenizer:
    """Writes nothing."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def nonzero(tensors: Sequence[Tensor]) -> int:
    return sum(int(tensor.count_nonzero()) for tensor in tensors)


def of_file(folder: Path, kind: str, ids: Tensor) -> dict[str, int]:
    """Parameters, bytes and FLOPs of a folder, counted without this project's own tables."""
    tensors = load_file(folder / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.float()(input_ids=ids[:1, :TOKENS], use_cache=False)
    flops = int(counter.get_total_flops())
    if kind == "weights":  # a multiplication with zero is counted by torch
        layers = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        flops -= 2 * TOKENS * (sum(w.numel() for w in layers) - nonzero(layers))
    parameters = nonzero(list(tensors.values())) if kind == "weights" else sum(t.numel() for t in tensors.values())
    return {
        "parameters": parameters,
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "flops": flops,
    }


def tables(model: PreTrainedModel, space: Space, dtype: torch.dtype) -> dict[str, CostTable]:
    return {
        "parameters": costs.parameters(model, space),
        "bytes": costs.size(model, space, dtype),
        "flops": costs.flops(model, space, TOKENS),
    }


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_promised_is_in_the_file(
    name: str,
    kind: str,
    model_of: Callable[..., PreTrainedModel],
    supernet_of: Callable[[PreTrainedModel, str], Supernet],
    random_allocations: Callable[..., list[Allocation]],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    model, dtype = model_of(name), torch.bfloat16
    supernet = supernet_of(model, kind)
    space, refused = supernet.space, REFUSED.get(kind, REFUSED.get(f"{kind} of {name}", ()))
    last = tuple(len(unit.levels) - 1 for unit in space.units)
    promised = tables(model, space, dtype)
    for limit in refused:
        with pytest.raises(InputError, match=f"budget.{limit}="):
            make_budget(
                {limit: promised[limit].dense - 1, "sequence_length": TOKENS}, model, space, lambda _: promised["flops"]
            )
    for index, allocation in enumerate([last, *random_allocations(space, 2, seed=3)]):
        pruned = rounded(assemble(model, supernet, allocation), dtype)
        folder = tmp_path / str(index)
        tokenizer: Any = NoTokenizer()
        export(pruned, tokenizer, folder, dtype=dtype)
        found = of_file(folder, kind, ids)
        for limit in promised.keys() - set(refused):
            table = promised[limit]
            cost = table.rest + sum(row[level] for row, level in zip(table.costs, allocation, strict=True))
            assert found[limit] == cost, (limit, allocation)
