"""How the command line says no: one line for every mistake, nothing is left behind, and the remedy that the line names
helps.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from search.inputs.models import random_llama
from tests.search.bad_inputs import COMMANDS, SETTINGS
from tests.search.settings_only import answer, at_work

Call = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]

SMOKE = "+experiment=smoke"
RUN = Path("outputs/search/smoke")
ROUNDS = 2  # of the smoke experiment


def placed(text: str, bad: Path) -> str:
    return text.replace("{bad}", str(bad))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that cannot be pruned."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "short.txt").write_text("Much too short.")
    (folder / "text.bin").write_text("Much too short.")
    llama = random_llama(0, 32, 64, 2, 2, 2, dtype=torch.float32)
    for name in ("bloom", "mamba", "nan"):
        llama.tokenizer.save_pretrained(folder / name)
    ends: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2, **ends)).save_pretrained(
        folder / "bloom"
    )
    mamba = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4, **ends)
    MambaForCausalLM(mamba).save_pretrained(folder / "mamba")
    llama.model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    llama.model.save_pretrained(folder / "nan")
    return folder


@pytest.fixture
def hydra_at_work() -> Iterator[None]:
    with at_work():
        yield


@pytest.mark.usefixtures("hydra_at_work")
@pytest.mark.parametrize("arguments", SETTINGS)
def test_a_mistake_in_the_settings_is_answered_in_one_line(arguments: str, bad: Path, tmp_path: Path) -> None:
    line = answer([SMOKE, *placed(arguments, bad).split()], tmp_path / "run")
    assert line is not None, "nothing is wrong with it"
    for part in SETTINGS[arguments]:
        assert placed(part, bad) in line
    assert not (tmp_path / "run").exists()


# A process that has imported everything forks a child for each command: importing takes seconds, a refusal
# milliseconds.
FORKS = """
import json, os, sys
import search.cli.command, search.run.pipeline
from search.__main__ import main
commands, folder = json.load(sys.stdin), os.getcwd()
for index, arguments in enumerate(commands):
    child = os.fork()
    if child == 0:
        os.makedirs(f"{folder}/{index}/work")
        os.chdir(f"{folder}/{index}/work")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv[1:] = arguments
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        os._exit(status)  # tearing down all that was imported takes longer than the refusal
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{folder}/{index}/status", "w") as file:
        file.write(str(status))
"""


@pytest.fixture(scope="module")
def answers(bad: Path, tmp_path_factory: pytest.TempPathFactory) -> list[CompletedProcess[str]]:
    """What the real command says to each of `COMMANDS`."""
    folder = tmp_path_factory.mktemp("commands")
    commands = [[placed(one, bad) for one in arguments] for arguments, _ in COMMANDS]
    subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(commands),
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    found = []
    for index, arguments in enumerate(commands):
        said = [(folder / str(index) / name).read_text() for name in ("status", "stdout", "stderr")]
        found.append(CompletedProcess(arguments, int(said[0]), *said[1:]))
    return found


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[" ".join(arguments) for arguments, _ in COMMANDS])
def test_a_mistake_is_answered_in_one_line_by_the_command(
    index: int, answers: list[CompletedProcess[str]], bad: Path, refusal: Refusal
) -> None:
    line = refusal(answers[index])
    for part in COMMANDS[index][1]:
        assert placed(part, bad) in line
    assert "Traceback" not in answers[index].stdout


def test_the_tables_are_as_long_as_was_promised() -> None:
    assert len(SETTINGS) >= 200
    assert len(COMMANDS) >= 25


def test_a_command_without_a_mistake_is_not_refused(hydra_at_work: None, tmp_path: Path) -> None:
    """Else the tables above would show nothing."""
    assert answer([SMOKE], tmp_path / "run") is None
    assert answer([SMOKE, "budget.sparsity=0", "strategy=uniform", "++prune.multiple=4"], tmp_path / "run") is None


def test_a_budget_of_nothing_shows_that_the_pipeline_loses_nothing(call: Call, tmp_path: Path) -> None:
    assert call(SMOKE, "budget.sparsity=0").returncode == 0
    metrics = json.loads((tmp_path / RUN / "metrics.json").read_text())
    assert metrics["searched"]["kept"] == 1.0
    assert metrics["searched"]["parameters"] == metrics["dense"]["parameters"]
    assert metrics["searched"]["perplexity"] == metrics["dense"]["perplexity"]
    assert abs(metrics["searched"]["kl_divergence"]) < 1e-6


@pytest.mark.sampled(0)
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


# Damage, end to end: `tests/faults` has the variety


def _flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


UNIT = "units/model.layers.0.mlp.safetensors"


@pytest.mark.sampled(0)
@pytest.mark.parametrize(
    ("pattern", "harm"),
    [(UNIT, _flip_last_bit), ("manifest.json", _cut)],
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


@pytest.mark.sampled(0)
@pytest.mark.parametrize(("file", "content"), [("checkpoint/round-1.json", "{"), ("history.parquet", "[]")])
def test_a_damaged_run_is_refused(
    file: str, content: str, copy: Path, call: Call, finished: Path, refusal: Refusal
) -> None:
    run = copy / RUN
    (run / file).write_text(content)
    if file == "history.parquet":  # read when the search goes on
        (run / "checkpoint/round-1.json").unlink()
    line = refusal(call(SMOKE))
    assert "fresh=true" in line and str(run) in line
    assert call(SMOKE, "fresh=true").returncode == 0
    assert (run / "allocation.json").read_bytes() == (finished / RUN / "allocation.json").read_bytes()
