"""Loads an exported folder as anybody would and writes down its losses: a script for a fresh process.

It imports nothing of this project, whose modules would hide that the folder lacks something. Run as

    python reload.py REQUEST.json

where the request names the `folder`, the token `ids` (a safetensors file), `dtype`, `device`, `trust`,
`unscored` and the `result` (a JSON file) to write.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


@torch.no_grad()
def sequence_losses(model: Any, ids: Tensor, unscored: int) -> list[float]:
    """Return the mean negative log likelihood of the tokens of each sequence, computed one sequence at a time.

    Args:
        model: A causal language model of transformers.
        ids: (sequences, tokens) int64.
        unscored: First positions of a sequence whose predictions do not count.
    """
    losses = []
    for sequence in ids.to(model.device):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, unscored:-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.float(), sequence[unscored + 1 :])))
    return losses


def load(request: dict[str, Any]) -> Any:
    """Return the model of the folder; raise where weights are missing, left over, or of other shapes."""
    # Any: what transformers declares leaves out the pair that output_loading_info makes of the result.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        trust_remote_code=request["trust"],
        dtype=getattr(torch, request["dtype"]),
        local_files_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"weights do not fit the classes: {wrong}")
    return model.eval()


def main(path: str) -> None:
    """Load the folder that the request names, measure it, and write the result."""
    request = json.loads(Path(path).read_text())
    model, ids = load(request), load_file(request["ids"])["ids"]
    try:
        losses = sequence_losses(model.to(request["device"]), ids, request["unscored"])
    except torch.OutOfMemoryError:  # the device may hold the unpruned model of the run as well
        losses = sequence_losses(model.to("cpu"), ids, request["unscored"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    Path(request["result"]).write_text(json.dumps({"losses": losses, "parameters": parameters}))
    ours = {"supernet", "local_prune", "search"} & sys.modules.keys()
    if ours:
        raise RuntimeError(f"the folder needs modules that are not in it: {', '.join(sorted(ours))}")


if __name__ == "__main__":
    main(sys.argv[1])
