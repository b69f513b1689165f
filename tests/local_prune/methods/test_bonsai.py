"""Bonsai's survey: what is sampled, what the regression finds, and that it knows a member that matters from others."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.methods.bonsai import BonsaiPruner, loss_without, order_scores, pool_of, priors, sample
from local_prune.methods.wanda_sp import wanda_sp
from local_prune.pruner import Calibration, Task
from local_prune.regression import kendall_tau, ridge, strength_of
from search.inputs.models import LoadedModel
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.models.forward import entry

CPU = torch.device("cpu")
MLP_1 = "model.layers.1.mlp"


def track(items: Any, title: str) -> Any:
    return items


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("members", "fraction", "drop", "chance"),
    [(100, 0.1, 10, 1.0), (3, 0.1, 1, 0.3), (8, 0.25, 2, 1.0), (5, 0.5, 2, 1.0), (1, 0.1, 0, 0.0), (2, 0.5, 1, 1.0)],
)
def test_the_pool_is_what_the_prior_values_least(members: int, fraction: float, drop: int, chance: float) -> None:
    prior = normal(members).abs()
    pool = pool_of(prior, fraction)
    assert (pool.drop, pool.chance) == (drop, pytest.approx(chance))
    assert set(pool.members.tolist()) == set(sorted(range(members), key=lambda m: float(prior[m]))[: 2 * drop])


@pytest.mark.parametrize(("members", "fraction"), [(40, 0.1), (7, 0.3), (3, 0.1), (1, 0.2)])
def test_pairs_are_complementary(members: int, fraction: float) -> None:
    prior = normal(members).abs()
    pool = pool_of(prior, fraction)
    generator = torch.Generator().manual_seed(0)
    touched = []
    for _ in range(400):
        signs = sample(pool, prior, generator)
        assert signs.shape == pool.members.shape
        if signs.any():
            assert int((signs == -1).sum()) == int((signs == 1).sum()) == pool.drop
        else:
            assert pool.chance < 1
        touched.append(bool(signs.any()))
    assert sum(touched) / 400 == pytest.approx(pool.chance, abs=0.08)


def test_members_of_low_prior_are_dropped_together() -> None:
    prior = torch.tensor([0.0, 0.0, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0])
    pool = pool_of(prior, 0.25)
    generator = torch.Generator().manual_seed(0)
    together = sum(bool(s[0] == s[1]) for s in (sample(pool, prior, generator) for _ in range(300)))
    assert together > 200  # a third if all were alike


def test_members_of_equal_prior_can_be_sampled() -> None:
    prior = torch.full((10,), 0.1)
    signs = sample(pool_of(prior, 0.5), prior, torch.Generator().manual_seed(0))
    assert sorted(signs.tolist()) == [-1.0] * 5 + [1.0] * 5


def test_tau_counts_pairs() -> None:
    a, b = normal(12), normal(12, seed=1)
    b[3] = b[7]
    expected = 0
    for i, j in itertools.combinations(range(12), 2):
        product = float((a[i] - a[j]) * (b[i] - b[j]))
        expected += (product > 0) - (product < 0)
    assert kendall_tau(a, b) == pytest.approx(expected / 66)
    assert kendall_tau(a, a) == 1.0
    assert kendall_tau(a, -a) == -1.0


@pytest.mark.parametrize(("pairs", "members"), [(20, 6), (6, 20)])
@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_ridge_minimises_its_objective(pairs: int, members: int, strength: float) -> None:
    S, y, prior = normal(pairs, members).sign(), normal(pairs, seed=1), normal(members, seed=2).abs()
    expected = S @ prior
    scale = max(0.0, float(expected @ y / (expected @ expected)))
    weighted = S * prior
    ridge_of = (strength * weighted.square().sum(1).mean()).sqrt()
    A = torch.cat([weighted, ridge_of * torch.eye(members, dtype=torch.float64)])
    B = torch.cat([y, ridge_of * torch.full((members,), scale, dtype=torch.float64)]).unsqueeze(1)
    solution = prior * torch.linalg.lstsq(A, B, driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(ridge(S, y, prior, strength), solution)


def test_ridge_ends_in_the_prior() -> None:
    S, prior = normal(20, 8).sign(), normal(8, seed=2).abs()
    torch.testing.assert_close(ridge(S, 3.0 * S @ prior, prior, torch.inf), 3.0 * prior)
    assert not ridge(S, -3.0 * S @ prior, prior, torch.inf).any()  # a prior that is wrong all over is not turned round
    assert not ridge(torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), prior, 1.0).any()


def test_the_prior_is_trusted_where_it_predicts_and_not_where_it_does_not() -> None:
    S = normal(60, 20).sign()
    worth = normal(20, seed=1).exp()
    assert strength_of(S, S @ worth, worth) == torch.inf
    noise = 0.3 * normal(60, seed=3)
    assert strength_of(S, S @ worth + noise, torch.ones(20, dtype=torch.float64)) < 3.0


def test_the_order_is_of_coefficients_in_the_pool_and_of_the_prior_above() -> None:
    prior = torch.tensor([0.5, 0.1, 0.9, 0.2, 0.3, 0.8])
    pool = pool_of(prior, 1 / 3)  # members 1, 3, 4, 0
    scores = order_scores(prior, pool, torch.tensor([5.0, -1.0, 5.0, 2.0]))
    assert scores.argsort().tolist() == [3, 0, 1, 4, 5, 2]


def test_the_prior_is_wanda_of_the_dense_model(family_model: PreTrainedModel, ids: Tensor) -> None:
    found = priors(family_model, sub_blocks(family_model), Calibration(ids, batch=2), CPU, track)
    hidden, contexts = entry(family_model, ids)
    for part in sub_blocks(family_model):
        context = contexts[part.block]
        norms = part.inputs(part.column, hidden, context).double().square().sum(0).sqrt()
        expected = wanda_sp(part.weight(part.column), norms, part.groups.width)
        torch.testing.assert_close(found[part.name], expected / expected.sum(), rtol=1e-4, atol=0.0)
        hidden = part(hidden, context)


def test_the_loss_of_a_sub_model_is_that_of_the_model_with_zeros(any_model: PreTrainedModel, ids: Tensor) -> None:
    changed = copy.deepcopy(any_model)
    columns = {part.name: torch.tensor([0, 5, 17]) for part in sub_blocks(changed) if part.block < 2}
    for part in sub_blocks(changed):
        if part.name in columns:
            part.weight(part.column)[:, columns[part.name]] = 0.0
    expected = float(changed(input_ids=ids, labels=ids).loss)
    assert loss_without(any_model, ids, columns, CPU) == pytest.approx(expected, rel=1e-5)
    assert loss_without(any_model, ids, {}, CPU) != pytest.approx(expected, rel=1e-4)
    labels = ids.clone()
    labels[:, :3] = -100  # transformers leaves such targets out
    expected = float(changed(input_ids=ids, labels=labels).loss)
    assert loss_without(any_model, ids, columns, CPU, unscored=2) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def decoy(tiny_llama: LoadedModel) -> PreTrainedModel:
    """A model that wants one token always, put in by neurons 40 to 47 of block 1, and that all other neurons tell
    nothing.

    Those neurons are weak by weight and activation, others loud in a direction that the head does not read.
    """
    model = tiny_llama.model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                continue
            parameter.mul_(0.05)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        embedding[:, 0] = 1.0  # every token looks alike
        head.zero_()
        head[7, 1] = 1.0  # token 7 is what direction 1 says
        down = model.model.layers[1].mlp.down_proj.weight
        down[:, :] = 0.0
        down[2, :] = torch.linspace(0.5, 1.0, down.shape[1])  # loud and unread
        gate, up = model.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.up_proj.weight
        gate[:, 0] = up[:, 0] = 1.0
        down[:, 40:48] = 0.0
        down[1, 40:48] = 0.3
    return model


def test_the_survey_finds_the_neurons_that_matter(decoy: PreTrainedModel) -> None:
    calibration = Calibration(torch.full((6, 16), 7))
    prior = priors(decoy, sub_blocks(decoy), calibration, CPU, track)[MLP_1]
    weakest = set(prior.argsort()[:8].tolist())
    assert weakest == set(range(40, 48))  # the prior alone would remove them first
    pruner = BonsaiPruner(samples=128, sequences=1, drop=0.1)
    scores = pruner.survey(decoy, calibration, CPU, track)[MLP_1]
    pool = pool_of(prior, 0.1).members.tolist()
    ranking = [member for member in scores.argsort(descending=True).tolist() if member in pool]
    assert len(set(ranking[:8]) & set(range(40, 48))) >= 7  # of 52, and with fewer pairs than members of all pools


def test_surveys_are_reproducible_and_differ_with_the_seed(tiny_llama: LoadedModel) -> None:
    calibration = Calibration(torch.randint(200, (4, 10), generator=torch.Generator().manual_seed(0)), batch=2)
    surveys = [
        BonsaiPruner(samples=8, sequences=3, seed=seed).survey(tiny_llama.model, calibration, CPU, track)
        for seed in (1, 1, 2)
    ]
    names = [part.name for part in sub_blocks(tiny_llama.model)]
    assert all(list(survey) == names for survey in surveys)
    for name in names:
        assert torch.equal(surveys[0][name], surveys[1][name])
        assert sorted(surveys[0][name].tolist()) == list(range(len(surveys[0][name])))
    assert any(not torch.equal(surveys[0][name], surveys[2][name]) for name in names)


def test_surveys_leave_the_model_and_the_global_generator_alone(tiny_llama: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.model.state_dict().items()}
    state = torch.random.get_rng_state()
    BonsaiPruner(samples=4, sequences=1).survey(
        tiny_llama.model, Calibration(torch.ones(2, 6, dtype=torch.int64)), CPU, track
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.model.state_dict().items())


def test_candidates_follow_the_survey() -> None:
    scores = torch.tensor([2.0, 0.0, 3.0, 1.0])
    found = BonsaiPruner().candidates(Task("unit", torch.ones(2, 4), None, scores), [3, 1])
    assert [candidate.kept.tolist() for candidate in found] == [[0, 2, 3], [2]]
    assert all(candidate.weight is None and candidate.bias is None for candidate in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 7}, r"samples=7 must be an even number"),
        ({"samples": 2}, r"samples=2 must be an even number of sub-models from 4"),
        ({"sequences": 0}, r"sequences=0 must be at least 1"),
        ({"drop": 0.0}, r"drop=0.0 must be above 0 and at most 0.5"),
        ({"drop": 0.6}, r"drop=0.6 must be above 0 and at most 0.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BonsaiPruner(**settings)


def test_broken_weights_are_refused(tiny_llama: LoadedModel) -> None:
    with torch.no_grad():
        tiny_llama.model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp: activations are not finite"):
        BonsaiPruner().survey(tiny_llama.model, Calibration(torch.ones(2, 6, dtype=torch.int64)), CPU, track)
