"""The command line takes any model, leaves alone what Hydra knows, and answers misspelt choices with the nearest."""

from pathlib import Path

import pytest

from search.arguments import accept_any_model, check_choices
from supernet.errors import InputError


@pytest.mark.parametrize(
    "value", ["org/name", "./folder", "/somewhere/else", "~/models/mine", "it's/quoted"], ids=lambda value: str(value)
)
def test_a_path_or_hub_id_becomes_the_pretrained_model(conf: Path, value: str) -> None:
    escaped = value.replace("'", r"\'")
    assert accept_any_model([f"model={value}", "seed=1"], conf) == ["model=pretrained", f"model.path='{escaped}'", "seed=1"]


def test_a_folder_of_the_working_directory_needs_no_slash(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert accept_any_model(["model=mine"], conf) == ["model=mine"]
    (tmp_path / "mine").mkdir()
    assert accept_any_model(["model=mine"], conf) == ["model=pretrained", "model.path='mine'"]


def test_a_known_name_wins_over_a_folder_of_that_name(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert accept_any_model(["model=smollm2"], conf) == ["model=smollm2"]


@pytest.mark.parametrize(
    "argument",
    [
        "model=smollm2,tiny_llama",
        "model=glob(*)",
        "budget.sparsity=0.25,0.5",
        "model.path=org/name",
        "+experiment=demo",
        "-m",
        "~evaluate",
        "+strategy.elite=2",
        "hydra.run.dir=a/b",
    ],
)
def test_everything_else_is_left_to_hydra(conf: Path, argument: str) -> None:
    assert accept_any_model([argument], conf) == [argument]
    check_choices([argument], conf)


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("model=smolm2", "did you mean smollm2"),
        ("model=tiny_llama,smolm2", "'smolm2'; did you mean smollm2"),
        ("strategy=unifrom", "did you mean uniform"),
        ("data=wikitext", "did you mean wikitext2"),
        ("+experiment=llama_50", "did you mean llama_50pct"),
        ("+experment=demo", "did you mean +experiment"),
        ("+modle=smollm2", "did you mean +model"),
        ("model=null", "there is no model 'null'"),
        ("data=", "there is no data ''"),
    ],
)
def test_a_misspelt_choice_is_answered_with_the_nearest(conf: Path, argument: str, near: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_choices(["seed=1", argument], conf)
    assert near in str(refusal.value)


def test_where_nothing_is_like_it_all_choices_are_named(conf: Path) -> None:
    every = ", ".join(sorted(file.stem for file in (conf / "experiment").glob("*.yaml")))
    with pytest.raises(InputError, match=f"did you mean {every}\\?"):
        check_choices(["+experiment=zzz"], conf)


@pytest.mark.parametrize("form", ["--config-dir={}", "--config-dir {}", "-cd {}"])
def test_choices_of_a_config_dir_count(conf: Path, tmp_path: Path, form: str) -> None:
    for group in ("model", "experiment"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "ours.yaml").touch()
    arguments = ["model=ours", "+experiment=ours"]
    with pytest.raises(InputError):
        check_choices(arguments, conf)
    given = form.format(tmp_path).split(" ")
    check_choices([*given, *arguments], conf)
    with pytest.raises(InputError, match="did you mean ours"):
        check_choices([*given, "model=urs"], conf)
