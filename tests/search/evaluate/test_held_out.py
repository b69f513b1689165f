"""Held-out perplexity and KL divergence are those of whole logits in float64, whatever the family."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluate.held_out import HeldOut, Metrics, difference, streamed
from search.evaluation.resources import RESIDENT, Resources
from supernet.models.architecture import parameter_count
from supernet.models.assemble import assemble
from supernet.store import Supernet

SupernetMaker = Callable[[PreTrainedModel], Supernet]


def track(items: Sequence[Tensor], title: str) -> Iterable[Tensor]:
    return items


@torch.no_grad()
def by_definition(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, first: int = 0) -> tuple[float, float]:
    """Perplexity and mean KL divergence a token, from the position `first` on."""
    log_p, log_q = (m(ids).logits[:, first:].double().log_softmax(-1) for m in (dense, model))
    loss = -log_q[:, :-1].gather(2, ids[:, first + 1 :, None]).mean()
    return math.exp(float(loss)), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.sampled
@pytest.mark.parametrize("batch", [2, 5])
def test_metrics_are_those_of_whole_logits(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, batch: int
) -> None:
    held_out = HeldOut(family_model, ids, batch, track)
    units = len(family_supernet.space.units)
    allocations = ((1,) * units, (2, 0, 3) * (units // 3))
    for model in (family_model, *(assemble(family_model, family_supernet, a) for a in allocations)):
        found = held_out.dense if model is family_model else held_out.measure(model, "pruned")
        perplexity, divergence = by_definition(family_model, model, ids)
        assert found.parameters == parameter_count(model)
        assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert found.kl_divergence == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert held_out.dense.kl_divergence == 0
    assert abs(held_out.measure(family_model, "dense").kl_divergence) < 1e-5


@pytest.mark.sampled
@pytest.mark.parametrize("resident", RESIDENT)
def test_metrics_block_by_block_are_those_of_the_assembled_model(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, resident: str
) -> None:
    allocation = (2, 0, 3) * (len(family_supernet.space.units) // 3)
    found = streamed(family_model, family_supernet, allocation, ids, Resources(resident=resident), family_model)
    perplexity, divergence = by_definition(family_model, assemble(family_model, family_supernet, allocation), ids)
    assert found.parameters == parameter_count(family_model)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-3)


@pytest.mark.sampled(0)
def test_leading_tokens_are_no_targets(family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor) -> None:
    """With three special tokens first, positions 0 and 1 predict what is always there."""
    allocation = (2, 0, 3) * (len(family_supernet.space.units) // 3)
    model = assemble(family_model, family_supernet, allocation)
    perplexity, divergence = by_definition(family_model, model, ids, 2)
    assert by_definition(family_model, model, ids)[1] != pytest.approx(divergence, rel=1e-3)
    whole = HeldOut(family_model, ids, 2, track, unscored=2).measure(model, "pruned")
    streams = streamed(family_model, family_supernet, allocation, ids, Resources(resident="model"), model, unscored=2)
    for found in (whole, streams):
        assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert found.kl_divergence == pytest.approx(divergence, rel=1e-3)


def test_parameters_that_are_zero_are_told(model_of: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = model_of("qwen2")  # whose head and embeddings are one
    dense = HeldOut(model, ids, 5, track).dense
    assert dense.nonzero == dense.parameters
    model.model.layers[0].mlp.up_proj.weight.data[:10] = 0.0
    model.model.embed_tokens.weight.data[3] = 0.0
    found = HeldOut(model, ids, 5, track).dense.to_json()
    assert found["parameters"] - found["nonzero_parameters"] == 10 * 64 + 64


def test_mixers_are_measured_too(
    mixer_model: PreTrainedModel, model_of: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    name = str(mixer_model.config.model_type)
    other = model_of(name)
    with torch.no_grad():
        for block in other.backbone.layers:
            block.mixer.out_proj.weight.mul_(0.5)
    perplexity, divergence = by_definition(mixer_model, other, ids)
    found = HeldOut(mixer_model, ids, 2, track).measure(other, "other")
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert divergence > 1e-3


@pytest.mark.sampled
@pytest.mark.parametrize("batch", [2, 5])
def test_every_number_has_its_standard_error(
    family_model: PreTrainedModel, family_supernet: Supernet, ids: Tensor, batch: int
) -> None:
    """Against numbers of each sequence alone."""
    held_out = HeldOut(family_model, ids, batch, track)
    levels = ((1,), (2, 0, 3))
    models = [
        assemble(family_model, family_supernet, one * (len(family_supernet.space.units) // len(one))) for one in levels
    ]
    found = [held_out.measure(model, "pruned") for model in models]
    alone = [[by_definition(family_model, model, row[None]) for row in ids] for model in models]
    losses, divergences = (np.array([[np.log(p) if k == 0 else d for p, d in one] for one in alone]) for k in (0, 1))
    for one, loss, divergence in zip(found, losses, divergences, strict=True):
        content = one.to_json()
        assert content["perplexity_error"] == pytest.approx(
            content["perplexity"] * np.std(loss, ddof=1) / 5**0.5, rel=1e-3
        )
        assert content["kl_divergence_error"] == pytest.approx(np.std(divergence, ddof=1) / 5**0.5, rel=1e-3)
    apart = difference(*found)
    assert apart["kl_divergence"] == pytest.approx((divergences[0] - divergences[1]).mean(), rel=1e-3)
    assert apart["kl_divergence_error"] == pytest.approx(
        np.std(divergences[0] - divergences[1], ddof=1) / 5**0.5, rel=1e-3
    )
    assert apart["log_perplexity_error"] == pytest.approx(np.std(losses[0] - losses[1], ddof=1) / 5**0.5, rel=1e-3)


@pytest.mark.sampled(0)
def test_one_sequence_has_no_error(family_model: PreTrainedModel, ids: Tensor) -> None:
    found = HeldOut(family_model, ids[:1], 5, track).dense
    assert found.to_json()["perplexity_error"] is None and difference(found, found)["kl_divergence_error"] is None


def test_means_below_zero_are_told_and_perplexities_beyond_all_numbers_are_infinite() -> None:
    found = Metrics(1, 1, np.array([800.0, 900.0]), np.array([-0.5, 0.25]))
    assert found.kl_divergence == -0.125
    assert found.perplexity == np.inf


@pytest.mark.parametrize("losses", [[2.0], [2.0, math.inf], [2.0, math.nan, 1.0]])
def test_one_sequence_has_no_error_nor_has_what_is_not_finite(losses: list[float]) -> None:
    metrics = Metrics(1, 1, np.array(losses), np.array(losses))
    assert metrics.to_json()["perplexity_error"] is metrics.to_json()["kl_divergence_error"] is None
    assert difference(metrics, metrics)["kl_divergence_error"] is None
