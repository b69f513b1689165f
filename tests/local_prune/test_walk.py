"""The walk sees what the pruned model computes, and fits what it says."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from local_prune.methods.depth import DepthPruner
from local_prune.methods.flap import FlapPruner
from local_prune.methods.gblm import GblmPruner
from local_prune.methods.gptq import GptqPruner
from local_prune.methods.obs import ObsPruner
from local_prune.methods.sparsegpt import SparseGptPruner
from local_prune.methods.taylor import TaylorPruner
from local_prune.methods.wanda import WandaPruner
from local_prune.pruner import FITS, Calibration, Pruner, Task
from local_prune.statistics import LeastSquares, Moments
from local_prune.text.streams import Streams, stream_bytes
from local_prune.walk import fit_of
from search.inputs.models import LoadedModel
from supernet.candidates import member_columns
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import assemble
from supernet.models.forward import entry
from supernet.space import Space, Unit
from supernet.store import Supernet

IDS = torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(3))
CHOSEN = (1, 2, 0, 1, 2, 2, 1, 1)  # levels of eight units, and of the next eight, for exact error accumulation

Built = Callable[..., Supernet]
ModelOf = Callable[..., PreTrainedModel]


@pytest.fixture
def model(tiny_llama: LoadedModel) -> PreTrainedModel:
    return tiny_llama.model


@dataclass
class Recorder:
    """A pruner that notes what it was asked."""

    pruner: Pruner = field(default_factory=ObsPruner)
    tasks: dict[str, Task] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pruner, name)

    def candidates(self, task: Task, kept: Sequence[int]) -> Any:
        self.tasks[task.where] = task
        return self.pruner.candidates(task, kept)

    def problem(self, name: str) -> LeastSquares:
        statistics = self.tasks[name].statistics
        assert isinstance(statistics, LeastSquares)
        return statistics


def on(unit: Unit, level: int) -> list[float]:
    return [float(index == level) for index in range(len(unit.levels))]


def exact(unit: Unit, index: int) -> list[float]:
    return on(unit, CHOSEN[index % len(CHOSEN)])


def dense(unit: Unit, index: int) -> list[float]:
    return on(unit, 0)


def uneven(unit: Unit, index: int) -> list[float]:
    return [0.5, 0.2, 0.3]


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Any:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].double().flatten(0, -2)))
        for module in modules
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def streams(model: PreTrainedModel) -> tuple[list[Tensor], dict[str, Tensor]]:
    """By hooks on whole forward passes of a Llama: the residual stream before every sub-block and behind the last; and
    what every linear layer gets, by name.
    """
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name
    }
    inputs = {}
    with inputs_of([*norms, model.model.norm]) as residual:
        model(IDS)
    for name, module in linears.items():
        with inputs_of([module]) as seen:
            model(IDS)
        inputs[name] = seen[0]
    return residual, inputs


def assert_problem(problem: LeastSquares, X: Tensor, T: Tensor) -> None:
    """That these are its sums. X: (tokens, d_in), T: (tokens, d_out), float64."""
    H, G = X.T @ X, X.T @ T
    assert problem.tokens == len(X)
    torch.testing.assert_close(problem.hessian.double(), H, rtol=1e-3, atol=1e-4 * float(H.abs().max()))
    torch.testing.assert_close(problem.moment.double(), G, rtol=1e-3, atol=1e-4 * float(G.abs().max()))
    assert problem.energy == pytest.approx(float(T.square().sum()), rel=1e-3)


def relative_error(output: Tensor, T: Tensor) -> float:
    return float((output - T).square().sum() / T.square().sum())


# Members


@pytest.mark.parametrize("fit", FITS)
def test_each_fit_solves_its_problem_on_the_pruned_models_own_inputs(
    model: PreTrainedModel, tmp_path: Path, built: Built, fit: str
) -> None:
    recorder = Recorder()
    supernet = built(model, tmp_path, recorder, IDS, weights=exact, fit=fit)
    dense_stream, dense_inputs = streams(model)
    for index, part in enumerate(sub_blocks(model)):
        prefix = [*CHOSEN[:index], *[0] * (len(CHOSEN) - index)]
        stream, inputs = streams(assemble(model, supernet, prefix))
        layer = f"{part.name}.{part.column}"
        X, W = inputs[layer], part.weight(part.column).double().T
        T = {"pruned": X @ W, "dense": dense_inputs[layer] @ W, "residual": dense_stream[index + 1] - stream[index]}[
            fit
        ]
        assert_problem(recorder.problem(part.name), X, T)

        H, G = X.T @ X, X.T @ T
        ridge = 0.01 * H.diagonal().mean()
        errors = supernet.manifest["units"][part.name]["errors"]
        for level in (1, 2):
            candidate = supernet.candidate(index, level)
            columns = member_columns(candidate.kept, part.groups.width)
            solution = candidate.weight.double().T
            left = H[columns][:, columns] @ solution + ridge * solution
            torch.testing.assert_close(
                left, G[columns] + ridge * W[columns], rtol=1e-2, atol=1e-2 * float(G.abs().max())
            )
            assert errors[level - 1] == pytest.approx(relative_error(X[:, columns] @ solution, T), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("pruner", [ObsPruner(), SparseGptPruner()], ids=["members", "weights"])
def test_the_fits_differ(model: PreTrainedModel, tmp_path: Path, built: Built, pruner: Pruner) -> None:
    supernets = [built(model, tmp_path, pruner, IDS, weights=exact, fit=fit) for fit in FITS]
    first, second, third = [one.candidate(len(one.space.units) - 1, 1).weight for one in supernets]
    assert not torch.allclose(first, second, rtol=1e-2) and not torch.allclose(second, third, rtol=1e-2)


@pytest.mark.sampled
@pytest.mark.parametrize("fit", FITS)
def test_the_batch_size_does_not_matter(family_model: PreTrainedModel, tmp_path: Path, built: Built, fit: str) -> None:
    """Of five sequences the last batch is short, and has a mask of its own."""
    recorders = {batch: Recorder() for batch in (5, 2, 50)}
    for batch, recorder in recorders.items():
        # All on the dense level, so that rounding cannot change what is kept on the way.
        built(family_model, tmp_path / str(batch), recorder, IDS, batch=batch, fit=fit, weights=dense)
    for name in recorders[5].tasks:
        whole = recorders[5].problem(name)
        for batch in (2, 50):
            problem = recorders[batch].problem(name)
            torch.testing.assert_close(problem.hessian, whole.hessian, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(problem.moment, whole.moment, rtol=1e-3, atol=1e-2)


def test_what_comes_next_sees_the_mean_over_levels(model: PreTrainedModel, tmp_path: Path, built: Built) -> None:
    recorder = Recorder()
    supernet = built(model, tmp_path, recorder, IDS, weights=uneven)
    runs = [streams(assemble(model, supernet, [level, *[0] * 7])) for level in range(3)]
    # behind the first attention
    stream = sum(weight * run[0][1] for weight, run in zip((0.5, 0.2, 0.3), runs, strict=True))
    layer = model.model.layers[0]
    with torch.no_grad():
        normed = layer.post_attention_layernorm(stream.float())
        X = (nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)).double()
    second = recorder.problem(supernet.space.units[1].name)
    torch.testing.assert_close(second.hessian.double(), X.T @ X, rtol=1e-3, atol=1e-3)


def test_a_bias_that_makes_up_for_members_reaches_what_comes_next(
    model: PreTrainedModel, tmp_path: Path, built: Built
) -> None:
    recorder = Recorder(FlapPruner())
    supernet = built(model, tmp_path, recorder, IDS, weights=exact)
    inputs = streams(assemble(model, supernet, (*CHOSEN[:7], 0)))[1]["model.layers.3.mlp.down_proj"]
    moments = recorder.tasks["model.layers.3.mlp"].statistics
    assert isinstance(moments, Moments)
    torch.testing.assert_close(moments.squares, inputs.square().sum(0), rtol=1e-3, atol=1e-6)


def test_single_query_heads_see_the_pruned_model(model: PreTrainedModel, tmp_path: Path, built: Built) -> None:
    recorder = Recorder(ObsPruner(query_heads=True))
    supernet = built(model, tmp_path, recorder, IDS, weights=exact)
    assert recorder.tasks["model.layers.0.self_attn"].width == 8
    inputs = streams(assemble(model, supernet, (*CHOSEN[:6], 0, 0)))[1]["model.layers.3.self_attn.o_proj"]
    H = inputs.T @ inputs
    torch.testing.assert_close(recorder.problem("model.layers.3.self_attn").hessian.double(), H, rtol=1e-3, atol=1e-4)


# Linear layers as units


@pytest.mark.sampled
@pytest.mark.parametrize("pruner", [SparseGptPruner(), GptqPruner([4, 2], 16)], ids=["weights", "bits"])
@pytest.mark.parametrize("fit", FITS)
def test_linear_layers_see_all_before_them_pruned(
    model_of: ModelOf, tmp_path: Path, built: Built, fit: str, pruner: Pruner
) -> None:
    """Those of the same sub-block, too. Layers inside a sub-block do not reach its residual: with it they fit as
    `pruned`.
    """
    model = model_of("llama_with_biases")
    recorder = Recorder(pruner)
    supernet = built(model, tmp_path, recorder, IDS, weights=exact, fit=fit)
    allocation = [CHOSEN[index % len(CHOSEN)] for index in range(len(supernet.space.units))]
    dense_stream, dense_inputs = streams(model)
    stream, inputs = streams(assemble(model, supernet, allocation))
    for index, part in enumerate(sub_blocks(model)):
        for layer in (layer for stage in part.stages for layer in stage):
            name = f"{part.name}.{layer}"
            X, W = inputs[name], part.weight(layer).double().T
            T = X @ W
            if fit == "dense":
                T = dense_inputs[name] @ W
            if fit == "residual" and layer == part.column:
                T = dense_stream[index + 1] - stream[index] - part.bias(layer).double()
            assert_problem(recorder.problem(name), X, T)
            unit = next(i for i, one in enumerate(supernet.space.units) if one.name == name)
            errors = supernet.manifest["units"][name]["errors"]
            for level, error in enumerate(errors, start=1):
                output = X @ supernet.candidate(unit, level).weight.double().T
                assert error == pytest.approx(relative_error(output, T), rel=1e-2, abs=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("pruner", [ObsPruner(), TaylorPruner(), GblmPruner()], ids=["members", "surveyed", "weights"])
@pytest.mark.parametrize("family", ["llama_with_biases", "gpt2"])
def test_a_pruner_is_told_all_about_a_unit(
    model_of: ModelOf, tmp_path: Path, built: Built, pruner: Pruner, family: str
) -> None:
    model, recorder = model_of(family), Recorder(pruner)
    built(model, tmp_path, recorder, IDS)
    survey = pruner.survey(model, Calibration(IDS, 2), torch.device("cpu"), lambda items, _: items)
    for part in sub_blocks(model):
        whole = part.name in recorder.tasks
        for layer in [part.column] if whole else [layer for stage in part.stages for layer in stage]:
            task = recorder.tasks[part.name if whole else f"{part.name}.{layer}"]
            assert torch.equal(task.dense, part.weight(layer))
            assert task.bias is part.bias(layer)
            assert task.width == (part.groups.width if whole else 1)
            assert task.scores is None if not survey else torch.equal(task.scores, survey[task.where])


def test_layers_with_the_same_inputs_share_one_hessian(model_of: ModelOf, tmp_path: Path, built: Built) -> None:
    recorder = Recorder(SparseGptPruner())
    built(model_of("llama"), tmp_path, recorder, IDS)
    for group in (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj")):
        problems = [recorder.problem(f"model.layers.1.{group[0]}.{layer}") for layer in group[1:]]
        assert all(one.upper is problems[0].upper and one._factors is problems[0]._factors for one in problems)
        assert len(problems[0]._factors) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("pruner", [ObsPruner(), WandaPruner(), SparseGptPruner()], ids=["members", "scored", "fitted"])
@pytest.mark.parametrize("fit", FITS)
def test_without_accumulation_all_see_the_dense_model(
    model_of: ModelOf, tmp_path: Path, built: Built, fit: str, pruner: Pruner
) -> None:
    model = model_of("llama")
    recorder = Recorder(pruner)
    built(model, tmp_path, recorder, IDS, weights=dense, fit=fit)
    inputs = streams(model)[1]
    columns = {part.name: part.column for part in sub_blocks(model)}
    for name, task in recorder.tasks.items():
        X = inputs[f"{name}.{columns[name]}" if name in columns else name]
        if isinstance(task.statistics, LeastSquares):
            assert_problem(task.statistics, X, X @ task.dense.double().T)
        else:
            assert isinstance(task.statistics, Moments)
            torch.testing.assert_close(task.statistics.squares, X.square().sum(0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(task.statistics.total, X.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pruner", [WandaPruner(), GptqPruner([4, 3], 16)], ids=["weights", "bits"])
@torch.no_grad()
def test_layers_see_the_mean_weights_of_those_before(
    model_of: ModelOf, tmp_path: Path, built: Built, pruner: Pruner
) -> None:
    model = model_of("llama")
    recorder = Recorder(pruner)
    supernet = built(model, tmp_path, recorder, IDS, weights=uneven)
    mean = copy.deepcopy(model)
    for index, unit in enumerate(supernet.space.units):
        weight = mean.get_submodule(unit.name).weight
        levels = [supernet.candidate(index, level) for level in (1, 2)]
        first, second = (weight * c.mask if c.weight is None else c.weight for c in levels)
        weight.copy_(0.5 * weight + 0.2 * first + 0.3 * second)
    for name, X in streams(mean)[1].items():
        statistics = recorder.tasks[name].statistics
        found = statistics.squares if isinstance(statistics, Moments) else statistics.hessian.diagonal().double()
        torch.testing.assert_close(found, X.square().sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("fit", FITS)
def test_the_batch_size_does_not_matter_to_linear_layers(
    any_model: PreTrainedModel, tmp_path: Path, built: Built, fit: str
) -> None:
    recorders = {batch: Recorder(GptqPruner([2], 16)) for batch in (5, 2)}
    for batch, recorder in recorders.items():
        built(any_model, tmp_path / str(batch), recorder, IDS, batch=batch, fit=fit, weights=dense)
    for name in recorders[5].tasks:
        whole, problem = (recorders[batch].problem(name) for batch in (5, 2))
        torch.testing.assert_close(problem.hessian, whole.hessian, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(problem.moment, whole.moment, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("fit", FITS)
def test_fits_are_one_where_no_errors_accumulate_or_nothing_is_fitted(
    model: PreTrainedModel, space_of: Callable[..., Space], fit: str
) -> None:
    """So no second stream of text is carried along for nothing."""
    space = space_of(model, ObsPruner(), (0.75, 0.25))
    calibration = Calibration(IDS, 2, fit)
    none, some = ({unit.name: of(unit, 0) for unit in space.units} for of in (dense, uneven))
    assert fit_of(model, calibration, ObsPruner(), space, none) == ("pruned", False)
    assert fit_of(model, calibration, ObsPruner(), space, some) == (fit, False)
    assert fit_of(model, calibration, FlapPruner(), space, some) == ("pruned", False)


# Sub-blocks that are absent


@pytest.mark.parametrize("fit", FITS)
def test_dropped_sub_blocks_leave_the_stream_alone(
    model: PreTrainedModel, tmp_path: Path, built: Built, fit: str
) -> None:
    recorder = Recorder()
    built(model, tmp_path, recorder, IDS, weights=lambda unit, _: on(unit, 1), fit=fit, kept=(0.0,))
    first, last = (recorder.problem(f"model.layers.{block}.self_attn") for block in (0, 3))
    assert last.tokens == first.tokens
    part = sub_blocks(model)[6]
    with torch.no_grad():
        hidden, contexts = entry(model, IDS)
        X = part.inputs(part.column, hidden, contexts[3]).double()  # of the embeddings
    torch.testing.assert_close(last.hessian.double(), X.T @ X, rtol=1e-3, atol=1e-3)


class SeeingPruner(DepthPruner):
    """Depth by a method that looks at inputs."""

    def statistics(self, dense: Tensor, width: int) -> Moments:  # type: ignore[override]
        return Moments.zeros(dense.shape[1])


@pytest.mark.sampled
@pytest.mark.parametrize("present", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("whole_blocks", [False, True])
@torch.no_grad()
def test_what_a_sub_block_adds_is_taken_as_often_as_it_is_present(
    any_model: PreTrainedModel, tmp_path: Path, built: Built, whole_blocks: bool, present: float
) -> None:
    recorder = Recorder(SeeingPruner(whole_blocks))
    built(any_model, tmp_path, recorder, IDS, batch=5, weights=lambda unit, index: [present, 1.0 - present])
    hidden, contexts = entry(any_model, IDS)
    for part in sub_blocks(any_model):
        name = part.block_name if whole_blocks else part.name
        # blocks are built at their first sub-block
        if not whole_blocks or part.stages == sub_blocks(any_model)[0].stages:
            statistics = recorder.tasks[name].statistics
            assert isinstance(statistics, Moments)
            X = part.inputs(part.column, hidden, contexts[part.block]).double()
            torch.testing.assert_close(statistics.squares, X.square().sum(0), rtol=1e-3, atol=1e-5)
        hidden = hidden + present * part.change(hidden, contexts[part.block])


# Families that differ


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("pruner", [ObsPruner(), SparseGptPruner()], ids=["members", "weights"])
def test_a_norm_before_the_residual_stream_makes_its_fit_that_of_the_layer(
    model_of: ModelOf, tmp_path: Path, built: Built, pruner: Pruner, family: str
) -> None:
    model = model_of(family)
    supernets = [built(model, tmp_path, pruner, IDS, weights=exact, fit=fit) for fit in FITS]
    files = [[file.read_bytes() for file in sorted((one.path / "units").iterdir())] for one in supernets]
    assert files[0] == files[2] != files[1]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_wide_residual_stream_stays_wide(
    model_of: ModelOf, tmp_path: Path, built: Built, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A last layer that is computed from kept inputs, which lie otherwise in memory, rounds otherwise in bfloat16.
    monkeypatch.setattr("local_prune.text.streams.INPUTS", 0)
    model = copy.deepcopy(model_of(family)).bfloat16()
    calibration = Calibration(IDS, 2, "residual")
    found = Streams(model, calibration, "residual", torch.device("cpu"), tmp_path)
    assert found.dense is not None
    assert found.pruned[0].dtype == found.dense.before(0, 0).dtype == torch.float32
    sizes = [2 * one.nbytes for one in (found.pruned[index] for index in range(3))]
    assert stream_bytes(model, calibration, "residual") == sum(sizes) == 2 * stream_bytes(model, calibration, "pruned")

    recorder = Recorder(WandaPruner())
    built(model, tmp_path, recorder, IDS, weights=dense, batch=5)
    name = sub_blocks(model)[-1].name + ".out_proj"
    with inputs_of([model.get_submodule(name)]) as seen:
        model(IDS)
    statistics = recorder.tasks[name].statistics
    assert isinstance(statistics, Moments)
    torch.testing.assert_close(statistics.squares, seen[0].square().sum(0), rtol=1e-3, atol=1e-6)
