"""How the command line says no: one line for every mistake, nothing is left behind, and the remedy that the line names helps."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from search.models import random_llama

Call = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]

SMOKE = "+experiment=smoke"
RUN = Path("outputs/search/smoke")
ROUNDS = 2  # of the smoke experiment


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that cannot be pruned."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "short.txt").write_text("Much too short.")
    llama = random_llama(0, 32, 64, 2, 2, 2, dtype=torch.float32)
    for name in ("bloom", "mamba", "nan"):
        llama.tokenizer.save_pretrained(folder / name)
    ends: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2, **ends)).save_pretrained(folder / "bloom")
    mamba = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4, **ends)
    MambaForCausalLM(mamba).save_pretrained(folder / "mamba")
    llama.model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    llama.model.save_pretrained(folder / "nan")
    return folder


BAD = {  # arguments -> what the line must say
    "model=smolm2": ["'smolm2'", "smollm2", "folder"],
    "strategy=guidde": ["'guidde'", "guided"],
    "prune=sparsgpt": ["'sparsgpt'", "sparsegpt"],
    "prune=base/linear": ["'base/linear'", "sparsegpt", "wanda"],
    "budget=bit": ["'bit'", "bits"],
    "+experment=smoke": ["experment", "+experiment"],
    "budget.sparsty=0.5": ["budget.sparsty", "did you mean budget.sparsity"],
    "nonsense=1": ["nonsense"],
    "nonsense": ["'nonsense'", "key=value"],
    "+strategy.elite=2": ["strategy", "elite"],
    "model={bad}/empty": ["empty", "config.json"],
    "model={bad}/nowhere": ["nowhere", "does not exist"],
    "model=./nowhere": ["./nowhere", "does not exist"],
    "model=org/nowhere": ["org/nowhere", "cannot be loaded", "hub id"],
    "model=pretrained": ["model.path", "not given"],
    "model={bad}/bloom": ["'bloom'", "llama, mistral, qwen2, qwen3", "gpt2", "mamba2"],
    "model={bad}/mamba": ["neither attention nor MLPs", "prune its weights or blocks"],
    "model={bad}/mamba prune=wanda_sp": ["neither attention nor MLPs", "prune its weights or blocks"],
    "model={bad}/nan": ["model.layers.1.mlp", "not finite", "weights"],
    "budget.sparsity=0": ["budget.sparsity=0", "between 0 and 1"],
    "budget.sparsity=1": ["budget.sparsity=1", "between 0 and 1"],
    "budget.sparsity=-1": ["budget.sparsity=-1", "between 0 and 1"],
    "budget.sparsity=1.5": ["budget.sparsity=1.5", "between 0 and 1"],
    "budget.sparsity=nan": ["budget.sparsity=nan", "between 0 and 1"],
    "budget.sparsity=half": ["budget.sparsity=half", "number"],
    "budget.sparsity=0.9 supernet.levels=3": ["budget.sparsity=0.9", "remove 0.5", "supernet.levels"],
    "data=local": ["data.source.path", "not given"],
    "data=local data.source.path={bad}/nothing.txt": ["nothing.txt", "does not exist"],
    "data=local data.source.path={bad}/short.txt": ["data.sequence_length=64", "short.txt", "more text"],
    "data=local data.source.path={bad}/empty": ["empty", "text file"],
    "data.sequence_length=0": ["data.sequence_length=0", "at least 2"],
    "data.sequences.search=0": ["data.sequences.search=0", "at least 1"],
    "stages=[bild]": ["bild", "build, search, evaluate, export"],
    "stages=[]": ["stages=[]", "build, search, evaluate, export"],
    "stages=build": ["stages=build", "list", "stages=[build"],
    "dtype=float99": ["dtype=float99", "auto, bfloat16, float16, float32"],
    "dtype=int8": ["dtype=int8", "auto, bfloat16, float16, float32"],
    "device=gpu": ["device=gpu", "use device=cpu"],
    "device=meta": ["device=meta", "use device=cpu"],
    "rounds=abc": ["rounds=abc", "whole number"],
    "rounds=0": ["rounds=0", "at least 1"],
    "seed=-1": ["seed=-1", "at least 0"],
    "seed=null": ["seed=None", "whole number"],
    "fresh=flase": ["fresh=flase", "true or false"],
    "dry_run=1": ["dry_run=1", "true or false"],
    "strategy.offspring=-3": ["strategy.offspring", "at least 1"],
    "strategy.offspring=many": ["strategy.offspring=many", "whole number"],
    "strategy.generations=2.5": ["strategy.generations=2.5", "whole number"],
    "strategy.proposal=sideways": ["strategy.proposal=sideways", "gradient, forward"],
    "strategy.tokens=0": ["strategy.tokens", "at least 1"],
    "strategy.errors=-1": ["strategy.errors=-1", "at least 0"],
    "strategy=evopress strategy.max_exchanges=0": ["strategy.max_exchanges", "at least 1"],
    "strategy=evopress strategy.survivors=[2,3]": ["strategy.survivors=[2, 3]", "end in 1"],
    "strategy=evopress strategy.survivors=[1]": ["strategy.survivors=[1]", "one number for each"],
    "strategy=evopress strategy.tokens=256": ["strategy.tokens=256", "list"],
    "prune.fit=well": ["prune.fit=well", "pruned, dense, residual"],
    "prune.fit=foo": ["prune.fit=foo", "pruned, dense, residual"],
    "prune.accumulation=foo": ["prune.accumulation=foo", "none, chosen, expectation"],
    "prune.accumulation=null": ["prune.accumulation=None", "none, chosen, expectation"],
    "prune.batch=0": ["prune.batch=0", "at least 1"],
    "prune.query_heads=perhaps": ["query_heads=perhaps", "true or false"],
    "prune.pruner.first_order=much": ["prune.pruner.first_order=much", "a number"],
    "prune=depth prune.pruner.whole_blocks=maybe": ["prune.pruner.whole_blocks=maybe", "true or false"],
    "prune=depth prune.query_heads=true": ["query_heads", "prune.query_heads"],
    "prune=flap prune.pruner.compensate=2": ["prune.pruner.compensate=2", "true or false"],
    "prune=wanda prune.pruner.pattern=2:2": ["prune.pruner.pattern=2:2", "N:M", "2:4"],
    "prune=wanda prune.pruner.pattern=abc": ["prune.pruner.pattern=abc", "N:M", "2:4"],
    "prune=wanda prune.pruner.pattern=[2:4,abc]": ["prune.pruner.pattern=abc", "N:M", "2:4"],
    "prune=wanda prune.pruner.pattern=[2:4,1:2]": ["prune.pruner.pattern=2:4,1:2", "same density"],
    "prune=wanda prune.pruner.pattern=24": ["prune.pruner.pattern=24", "quote"],
    "prune=sparsegpt prune.pruner.pattern=2:3": ["prune.pruner.pattern=2:3", "64 inputs of model.layers.0.self_attn.q_proj"],
    "prune=magnitude prune.pruner.pattern=2:4 budget.sparsity=0.6": ["budget.sparsity=0.6", "remove 0.5", "pattern"],
    "prune=sparsegpt prune.pruner.damping=0": ["prune.pruner.damping=0", "above 0"],
    "prune=sparsegpt prune.pruner.block=0": ["prune.pruner.block=0", "at least 1"],
    "prune=apt prune.pruner.damping=much": ["prune.pruner.damping=much", "a number"],
    "prune=gblm prune.pruner.norm=3": ["prune.pruner.norm=3", "1 or 2"],
    "prune=gptq prune.pruner.bits=[1]": ["prune.pruner.bits=[1]", "2 to 8", "[8,6,4,3,2]"],
    "prune=gptq prune.pruner.bits=[]": ["prune.pruner.bits=[]", "2 to 8", "[8,6,4,3,2]"],
    "prune=rtn prune.pruner.bits=4": ["prune.pruner.bits=4", "list"],
    "prune=rtn prune.pruner.bits=[4.5]": ["prune.pruner.bits=[4.5]", "2 to 8"],
    "prune=gptq prune.pruner.group=0": ["prune.pruner.group=0", "at least 1"],
    "prune=gptq prune.pruner.group=big": ["prune.pruner.group=big", "whole number"],
    "prune=gptq prune.pruner.symmetric=1": ["prune.pruner.symmetric=1", "true or false"],
    "prune=gptq +prune.pruner.symetric=true": ["symetric"],
    "prune=gptq budget=bits budget.bits=1": ["budget.bits=1", "bits a weight", "prune.pruner.bits"],
    "prune=gptq budget=bits budget.bits=0": ["budget.bits=0", "between 0 and the 32 bits"],
    "prune=gptq budget=bits budget.bits=40": ["budget.bits=40", "between 0 and the 32 bits"],
    "prune=gptq budget=bits budget.bits=nan": ["budget.bits=nan", "between 0 and the 32 bits"],
    "prune=gptq budget=bits budget.bits=four": ["budget.bits=four", "number"],
    "budget=bits": ["budget.bits=4.25", "budget=parameters", "prune=gptq"],
    "prune=wanda budget=bits budget.bits=4": ["budget.bits=4", "budget=parameters", "prune=gptq"],
    "prune=gptq budget.parameters=2e5": ["budget.parameters=200000", "budget.bits or budget.sparsity"],
    "prune=gptq budget.flops=1e9": ["budget.flops=1000000000", "budget.bits or budget.sparsity"],
    "prune=gptq budget.bytes=1kB": ["budget.bytes=1kB", "full width", "budget.bits"],
    "prune=wanda budget.bytes=200kB": ["budget.bytes=200kB", "written all the same", "budget.sparsity"],
    "budget.bytes=1kB": ["budget.bytes=1kB", "bytes of what is not pruned", "embeddings"],
    "export.dtype=float64": ["export.dtype=float64", "bfloat16"],
    "export.check=perhaps": ["export.check=perhaps", "true or false"],
    "budget.bytes=1GB": ["budget.bytes=1GB", "1,116,928 bytes of the dense model"],
    "budget.bytes=much": ["budget.bytes=much", "4GB"],
    "budget.bytes=1.5": ["budget.bytes=1.5", "4GB"],
    "budget.parameters=1e9": ["budget.parameters=1000000000", "279,232 parameters of the dense model", "fewer"],
    "budget.parameters=1000": ["budget.parameters=1000", "32,960 parameters of what is not pruned", "32,960 to 279,232"],
    "budget.parameters=4e4 supernet.levels=3": ["budget.parameters=40000", "supernet.levels"],
    "budget.parameters=0": ["budget.parameters=0", "above 0"],
    "budget.parameters=inf": ["budget.parameters=inf", "finite"],
    "budget.parameters=some": ["budget.parameters=some", "number"],
    "budget.paramters=1e5": ["budget.paramters", "budget.parameters"],
    "budget.flops=-1": ["budget.flops=-1", "above 0"],
    "budget.flops=1": ["budget.flops=1", "flops of what is not pruned"],
    "budget.flops=1e9 budget.sequence_length=0": ["budget.sequence_length=0", "at least 1"],
    "budget.speedup=1": ["budget.speedup=1", "above 1"],
    "budget.speedup=nan": ["budget.speedup=nan", "above 1"],
    "budget.speedup=fast": ["budget.speedup=fast", "number"],
    "budget.speedup=1e6 budget.prompt=8": ["budget.speedup=1000000", "times as fast", "supernet.levels"],
    "budget.speedup=2 budget.prompt=0": ["budget.prompt=0", "at least 1"],
    "budget.speedup=2 budget.batch=two": ["budget.batch=two", "at least 1"],
    "budget.speedup=2 budget.generated=-1": ["budget.generated=-1", "at least 0"],
    "budget.speedup=2 budget.prompt=5000": ["budget.prompt=5000", "2048 tokens"],
    "prune=wanda budget.speedup=2": ["budget.speedup=2", "makes layers smaller", "prune=depth"],
    "prune=gptq budget.speedup=2 dry_run=true": ["budget.speedup=2", "makes layers smaller"],
    "prune.query_heads=true budget.speedup=2": ["budget.speedup=2", "query heads", "prune=obs"],
    "budget.sparsity=0.2 budget.bits=4": ["budget.bits=4", "prune=gptq"],
    "prune=wanda prune.fit=dense": ["prune.fit is only for the methods that fit", "prune=obs"],
    "prune=depth prune.accumulation=none": ["prune.accumulation is only for methods that look at activations"],
    "prune.multiple=0": ["prune.multiple=0", "at least 1"],
    "prune.multiple=999": ["prune.multiple=999", "256 neurons"],
    "prune.pruner.damping=-1": ["prune.pruner.damping=-1", "above 0"],
    "prune.pruner.damping=inf": ["prune.pruner.damping=inf", "finite and above 0"],
    "prune.pruner.first_order=nan": ["prune.pruner.first_order=nan", "finite and not below 0"],
    "prune=sparsegpt prune.pruner.damping=nan": ["prune.pruner.damping=nan", "finite and above 0"],
    "prune=gptq prune.pruner.damping=inf": ["prune.pruner.damping=inf", "finite and above 0"],
    "prune=gblm prune.pruner.gradient_weight=inf": ["prune.pruner.gradient_weight=inf", "finite and not below 0"],
    "prune=gblm prune.pruner.gradient_weight=-1": ["prune.pruner.gradient_weight=-1", "finite and not below 0"],
    "prune=bonsai prune.pruner.drop=nan": ["prune.pruner.drop=nan", "above 0 and at most 0.5"],
    "prune=wanda prune.pruner.pattern=[]": ["prune.pruner.pattern=[]", "null", "2:4"],
    "supernet.levels=1": ["supernet.levels=1", "at least 2"],
    "supernet.lowest=-0.1": ["supernet.lowest=-0.1", "at least 0 and below 1"],
    "supernet.lowest=1": ["supernet.lowest=1", "at least 0 and below 1"],
    "supernet.lowest=low": ["supernet.lowest=low", "number"],
    "supernet.step=0": ["supernet.step=0", "between 0 and 1"],
    "supernet.root={bad}/file/below": ["{bad}/file/below", "choose another"],
    "hydra.run.dir={bad}/file/below": ["{bad}/file/below", "Not a directory"],
    "evaluate.batch=0": ["evaluate.batch=0", "at least 1"],
    "fitness.chunk_bytes=0": ["fitness.chunk_bytes=0", "at least 1048576"],
    "fitness.chunk_bytes=lots": ["fitness.chunk_bytes=lots", "whole number"],
    "fitness.hidden_weight=-1": ["fitness.hidden_weight=-1", "at least 0"],
    "fitness=topk_kl fitness.k=0": ["fitness.k=0", "at least 1"],
    "fitness=kl_div": ["kl_div", "fitness", "kl"],
    "evaluator.resident=disk": ["evaluator.resident=disk", "model, blocks"],
    "evaluator.memory=lots": ["evaluator.memory=lots", "4GB"],
    "evaluator.cache=-1": ["evaluator.cache=-1", "4GB"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_answered_in_one_line(arguments: str, bad: Path, call: Call, tmp_path: Path, refusal: Refusal) -> None:
    line = refusal(call(SMOKE, *arguments.format(bad=bad).split()))
    for part in BAD[arguments]:
        assert part.format(bad=bad) in line
    assert not (tmp_path / RUN / "checkpoint/settings.json").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["+experiment=smke"], "smoke"), ([SMOKE, "budget.sparsty=0.5"], "budget.sparsity"), ([SMOKE, "rounds=abc"], "rounds=abc")],
    ids=["before Hydra", "in Hydra", "in the job"],
)
def test_a_mistake_is_answered_in_one_line_by_a_fresh_process(
    arguments: list[str], part: str, run_search: Call, tmp_path: Path, refusal: Refusal
) -> None:
    assert part in refusal(run_search(tmp_path, *arguments))


@pytest.mark.parametrize(("strategy", "prune"), [("flap", "depth"), ("shortgpt", "wanda")])
def test_a_rule_for_other_units_is_refused_before_anything_is_built(
    strategy: str, prune: str, call: Call, tmp_path: Path, refusal: Refusal
) -> None:
    for more in ("rounds=1", "dry_run=true"):
        line = refusal(call(SMOKE, f"strategy={strategy}", f"prune={prune}", "supernet.root=supernets", more))
        assert f"strategy={strategy} is for " in line and "; use " in line
    assert not (tmp_path / "supernets").exists()


def test_a_configuration_that_is_not_yaml_is_answered_in_one_line(call: Call, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "ours/model").mkdir(parents=True)
    (tmp_path / "ours/model/broken.yaml").write_text("a: b\n  c: d\n")
    line = refusal(call("--config-dir=ours", SMOKE, "model=broken"))
    assert "model/broken.yaml" in line and "line 2" in line


def test_a_setting_that_only_a_users_experiment_has_is_refused(call: Call, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "ours/experiment").mkdir(parents=True)
    (tmp_path / "ours/experiment/mine.yaml").write_text("# @package _global_\nbudget: {sparsty: 0.5}\n")
    line = refusal(call("--config-dir=ours", "+experiment=mine"))
    assert "there is no setting budget.sparsty; did you mean budget.sparsity" in line


def test_a_mistake_in_one_job_of_a_sweep_is_answered_in_one_line(call: Call, refusal: Refusal) -> None:
    assert "budget.sparsity=7" in refusal(call("-m", SMOKE, "budget.sparsity=0.25,7", "stages=[build]"))


# Damage


def _flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


UNIT = "units/model.layers.0.mlp.safetensors"


@pytest.mark.parametrize(
    ("pattern", "harm"),
    [(UNIT, _flip_last_bit), (UNIT, _cut), (UNIT, Path.unlink), ("manifest.json", _flip_last_bit), ("manifest.json", _cut)],
)
def test_a_tampered_supernet_is_refused(
    pattern: str, harm: Callable[[Path], None], copy: Path, call: Call, refusal: Refusal
) -> None:
    shutil.rmtree(copy / "outputs")
    files = list((copy / "cache/supernets").glob(f"*/{pattern}"))
    assert len(files) >= ROUNDS
    for file in files:
        harm(file)
    line = refusal(call(SMOKE))
    assert Path(pattern).name in line and "damaged" in line and "delete the folder" in line
    folder = Path(line.partition("delete the folder ")[2].partition(" and build again")[0])
    assert folder.parent == copy / "cache/supernets"
    # The remedy that the line names helps.
    for broken in files:
        shutil.rmtree(broken.parents[len(Path(pattern).parts) - 1])
    assert call(SMOKE, "stages=[build,search]").returncode == 0


@pytest.mark.parametrize("file", ["checkpoint/round-1.json", "checkpoint/settings.json", "history.parquet"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_is_refused(file: str, content: str, copy: Path, call: Call, finished: Path, refusal: Refusal) -> None:
    run = copy / RUN
    (run / file).write_text(content)
    if file == "history.parquet":  # read when the search goes on
        (run / "checkpoint/round-1.json").unlink()
    line = refusal(call(SMOKE))
    assert "fresh=true" in line and str(run) in line
    assert call(SMOKE, "fresh=true").returncode == 0
    assert (run / "allocation.json").read_bytes() == (finished / RUN / "allocation.json").read_bytes()
