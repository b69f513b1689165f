"""What levels change, by the derivatives of a whole model in float64, and candidates of every kind to compare with."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from search.evaluation.fitness import CrossEntropy, Fitness, TopKDivergence
from search.run.levels import Grid
from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights, member_columns
from supernet.models.architecture import SubBlock, sub_blocks
from supernet.models.forward import entry, final_norm_and_head
from supernet.models.placement import Place, full_weight, is_absent, places
from supernet.models.prunables import (
    Pattern,
    Prunable,
    bit_prunables,
    member_prunables,
    presence_prunables,
    weight_prunables,
)
from supernet.space import BITS, Allocation

ModelOf = Callable[..., PreTrainedModel]
Draw = Callable[..., Sequence[Allocation]]
Candidates = Mapping[int, Candidate | None]  # of a sub-block's units

CHOSEN = np.array([3, 0, 4])
GROUP = 16  # inputs that share a scale
KINDS: dict[str, Callable[[Sequence[SubBlock]], Sequence[Prunable]]] = {  # of units, by what prunes them
    "members": lambda parts: member_prunables(parts, 1),
    "members with biases": lambda parts: member_prunables(parts, 1, bias=True),
    "query heads": lambda parts: member_prunables(parts, 1, query_heads=True),
    "weights": lambda parts: weight_prunables(parts, []),
    "N:M": lambda parts: weight_prunables(parts, [Pattern(2, 4), Pattern(1, 4)]),
    "bits": lambda parts: bit_prunables(parts, (4, 3, 2), GROUP),
    "sub-blocks": lambda parts: presence_prunables(parts, False),
    "blocks": lambda parts: presence_prunables(parts, True),
}
MEMBERS = ("members", "members with biases", "query heads")


class Handmade:
    """Candidates of every unit of a kind, as a supernet gives them: in turn refitted, far from the dense weights, and
    not.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        parts = sub_blocks(model)
        most = 4 if kind == "weights" else 5  # the fifth would be zeros, and behind zeros nothing has a gradient
        self.space = Grid(most, 0.25).first(KINDS[kind](parts)).space
        self.biases = kind == "members with biases"
        generator = torch.Generator().manual_seed(4)
        self.candidates: list[list[Candidate]] = [[] for _ in self.space.units]
        for place in places(model, self.space):
            for unit, layer in place.units:
                levels = range(1, len(self.space.units[unit].levels))
                made = [self._made(place.part, layer, unit, level, generator) for level in levels]
                self.candidates[unit] = made  # of a whole block twice the same

    def candidate(self, unit: int, level: int, device: Any = "cpu") -> Candidate:
        return self.candidates[unit][level - 1]

    def _made(self, part: SubBlock, layer: str | None, unit: int, level: int, generator: torch.Generator) -> Candidate:
        dense, kept, refitted = part.weight(layer or part.column), self.space.units[unit].levels[level].kept, level % 2
        noise = 0.1 * torch.randn(dense.shape, generator=generator).to(dense)
        if self.space.units[unit].total == 1:
            return Dropped()
        if layer is None:
            assert part.groups is not None
            stays = torch.randperm(part.groups.members, generator=generator)[:kept].sort().values
            weight = (dense + noise)[:, member_columns(stays, part.groups.width)] if refitted else None
            return Members(stays, weight, noise.sum(1) if self.biases else None)
        if self.space.units[unit].kind == BITS:
            scale = dense.view(len(dense), -1, GROUP).abs().amax(2) / (2 ** (kept - 1) - 1)
            codes = (dense / scale.repeat_interleave(GROUP, 1)).round() + 2 ** (kept - 1)
            return Quantised(
                codes.to(torch.uint8), scale, torch.full_like(scale, 2 ** (kept - 1), dtype=torch.uint8), kept
            )
        order = torch.rand(len(dense), dense.shape[1] // 4, 4, generator=generator).argsort(2).argsort(2)
        mask = order.view(dense.shape) < 4 * kept // dense.numel()  # of every four inputs as many stay
        return Weights(mask, (dense + noise) * mask if refitted else None)


def at(part: SubBlock, layer: str, candidate: Candidate | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer at a candidate, at full size."""
    weight = part.weight(layer)
    own = part.bias(layer)
    bias = weight.new_zeros(len(weight)) if own is None else own
    if isinstance(candidate, Members) and candidate.bias is not None:
        bias = candidate.bias.to(weight)
    return weight if candidate is None else full_weight(part, layer, candidate), bias


@dataclass(frozen=True)
class WholeModel:
    """The fitness by its definition, of a model in float64 at full size that is on its way to other levels."""

    model: PreTrainedModel
    supernet: Any
    fitness: Fitness
    ids: Tensor

    def effects(self, allocation: Allocation) -> list[np.ndarray]:
        """The derivatives by the steps that each unit takes towards each level, where none is taken."""
        steps = [step.requires_grad_() for step in self.no_steps()]
        with torch.enable_grad():
            loss = self.loss(allocation, steps)
        return [gradient.numpy() for gradient in torch.autograd.grad(loss, steps, materialize_grads=True)]

    def no_steps(self) -> list[Tensor]:
        return [torch.zeros(len(unit.levels), dtype=torch.float64) for unit in self.supernet.space.units]

    def loss(self, allocation: Allocation, steps: Sequence[Tensor]) -> Tensor:
        """The mean of a token's; without steps that of the allocation, and with a single one of 1 that of its unit
        moved.
        """
        dense, dense_logits = self._run((0,) * len(allocation), self.no_steps())
        final, logits = self._run(allocation, steps)
        scored = slice(None)
        if isinstance(self.fitness, CrossEntropy):
            scored = slice(None, -1)
            losses = nn.functional.cross_entropy(logits[:, :-1].mT, self.ids[:, 1:], reduction="none")
        else:
            if isinstance(self.fitness, TopKDivergence):
                likeliest = dense_logits.topk(self.fitness.k, -1).indices
                dense_logits, logits = dense_logits.gather(-1, likeliest), logits.gather(-1, likeliest)
            log_p, log_q = dense_logits.log_softmax(-1), logits.log_softmax(-1)
            losses = (log_p.exp() * (log_p - log_q)).sum(-1)
        apart = 1 - torch.cosine_similarity(final, dense, dim=-1)
        mean: Tensor = (losses + self.fitness.hidden_weight * apart[:, scored]).mean()  # type: ignore[attr-defined]
        return mean

    def _run(self, allocation: Allocation, steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Final hidden states (sequences, tokens, hidden) and logits."""
        hidden, contexts = entry(self.model, self.ids)
        for place in places(self.model, self.supernet.space):
            levels = {unit: self._candidates(unit) for unit, _ in place.units}
            now = {unit: levels[unit][allocation[unit]] for unit in levels}
            added = here = self._added(place, hidden, contexts, now, levels, steps)
            for unit, candidates in levels.items():
                for step, candidate in zip(steps[unit], candidates, strict=True):
                    if is_absent(candidate) or is_absent(now[unit]):  # it comes or goes as a whole
                        there = self._added(place, hidden, contexts, now | {unit: candidate}, levels, steps)
                        added = added + step * (there - here)
            hidden = hidden + added
        normed, head = final_norm_and_head(self.model, hidden)
        logits = head.linear(normed)
        return normed, logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)

    def _added(
        self,
        place: Place,
        hidden: Tensor,
        contexts: Sequence[Mapping[str, Any]],
        now: Candidates,
        levels: Mapping[int, Sequence[Candidate | None]],
        steps: Sequence[Tensor],
    ) -> Tensor:
        """What a sub-block adds, with its layers' steps towards the levels at which it is present."""
        if any(is_absent(candidate) for candidate in now.values()):
            return torch.zeros_like(hidden)
        weights: dict[str, Tensor] = {}
        for unit, layer in place.units:
            name = layer or place.part.column
            weight, bias = here = at(place.part, name, now[unit])
            for step, candidate in zip(steps[unit], levels[unit], strict=True):
                if not is_absent(candidate):
                    there = at(place.part, name, candidate)
                    weight, bias = weight + step * (there[0] - here[0]), bias + step * (there[1] - here[1])
            weights |= place.part.replaced(name, weight, bias)
        return place.part.change(hidden, contexts[place.part.block], weights)

    def _candidates(self, unit: int) -> list[Candidate | None]:
        return [
            None,
            *(self.supernet.candidate(unit, level) for level in range(1, len(self.supernet.space.units[unit].levels))),
        ]


def whole(model: PreTrainedModel, supernet: Any, fitness: Fitness, ids: Tensor) -> WholeModel:
    return WholeModel(copy.deepcopy(model).double(), supernet, fitness, ids[CHOSEN])


def close(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 2e-4) -> None:
    """Each within a share of the largest."""
    assert [one.shape for one in found] == [one.shape for one in expected]
    largest = max(float(np.abs(one).max()) for one in expected)
    assert largest > 1e-3  # far above what rounding does
    np.testing.assert_allclose(
        np.concatenate(found), np.concatenate(expected), rtol=tolerance, atol=tolerance * largest
    )
