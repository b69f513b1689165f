"""The command line takes any model, leaves alone what Hydra knows, and answers misspelt choices with the nearest."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from search.cli.arguments import check_choices, prepared
from supernet.errors import InputError


def test_a_folder_is_another_model_than_one_of_the_hub(conf: Path, tmp_path: Path) -> None:
    """By which it gets another text, unless one is chosen."""
    local = f"model.path='{tmp_path}'"
    assert prepared([f"model={tmp_path}"], conf) == ["model=folder", local]
    assert prepared(["model=pretrained", f"model.path={tmp_path}"], conf) == ["model=folder", local]
    assert prepared(["-m", "model=pretrained", f"model.path={tmp_path},{tmp_path}"], conf)[1] == "model=folder"
    assert prepared(["model=pretrained", "model.path=org/name"], conf)[0] == "model=pretrained"


@pytest.mark.parametrize(
    "value", ["org/name", "./folder", "/somewhere/else", "~/models/mine", "it's/quoted"], ids=lambda value: str(value)
)
def test_a_path_or_hub_id_becomes_the_pretrained_model(conf: Path, value: str) -> None:
    escaped = value.replace("'", r"\'")
    assert prepared([f"model={value}", "seed=1"], conf) == ["model=pretrained", f"model.path='{escaped}'", "seed=1"]


def test_a_folder_of_the_working_directory_needs_no_slash(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepared(["model=mine"], conf) == ["model=mine"]
    (tmp_path / "mine").mkdir()
    assert prepared(["model=mine"], conf) == ["model=folder", "model.path='mine'"]


def test_a_known_name_wins_over_a_folder_of_that_name(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert prepared(["model=smollm2"], conf) == ["model=smollm2"]


ODD = [
    "a,b",
    "step=100",
    "base (merged)",
    "[x]",
    "{y}",
    "a b",
    "it's",
    'say "a"',
    "加卷",
    "a:b",
    "#1",
    "$5",
    "back\\slash",
    "end\\",
]


def as_hydra_reads_it(override: str) -> str:
    value: Any = OverridesParser.create().parse_override(override).value()
    return str(getattr(value, "text", value))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "key", ["data.source.path", "supernet.root", "strategy.file", "hydra.run.dir", "+data.source.path"]
)
def test_a_path_reaches_hydra_as_a_person_types_it(conf: Path, key: str, name: str) -> None:
    (found,) = prepared([f"{key}=/somewhere/{name}"], conf)
    assert found.startswith(f"{key}=")
    assert as_hydra_reads_it(found) == f"/somewhere/{name}"


@pytest.mark.parametrize(
    ("name", "quotes"),
    [(name, "") for name in ODD]
    + [(name, quote) for name in ODD for quote in "'\"" if quote not in name and not name.endswith("\\")],
)
def test_so_does_a_model(conf: Path, name: str, quotes: str) -> None:
    choice, path = prepared([f"model={quotes}./{name}{quotes}"], conf)
    assert choice == "model=pretrained"
    assert as_hydra_reads_it(path) == f"./{name}"


@pytest.mark.parametrize("value", ["null", "${oc.env:HOME}/text", ""])
def test_what_is_no_plain_path_stays_as_it_is(conf: Path, value: str) -> None:
    assert prepared([f"supernet.root={value}"], conf) == [f"supernet.root={value}"]


def test_a_sweep_is_parted_at_commas_unless_the_whole_is_there(conf: Path, tmp_path: Path) -> None:
    whole = tmp_path / "a,b"
    paths = ["-m", "data.source.path=x/1.txt,'x/2,3.txt'", f"supernet.root={whole}", "model=m/1,m/2"]
    after = ["model=pretrained", "model.path='m/1','m/2'"]
    once = f"supernet.root='{tmp_path}/a','b'"
    assert prepared(paths, conf) == ["-m", "data.source.path='x/1.txt','x/2,3.txt'", once, *after]
    whole.mkdir()
    assert prepared(paths, conf)[2] == f"supernet.root='{whole}'"
    with pytest.raises(InputError, match="a sweep is over names or over folders"):
        prepared(["-m", "model=smollm2,m/1"], conf)


def test_flags_may_stand_anywhere(conf: Path) -> None:
    given = ["+experiment=smoke", "-m", "seed=0,1", "--config-dir", "ours", "rounds=1", "--info=all", "-cd=theirs"]
    flags = ["-m", "--config-dir", "ours", "--info=all", "-cd=theirs"]
    assert prepared(given, conf) == [*flags, "+experiment=smoke", "seed=0,1", "rounds=1"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--nope", "--nope is no flag; did you mean"),
        ("--multrun", "did you mean --multirun"),
        ("-x", "key=value"),
        ("--config-dir", "needs a value"),
        ("=5", "no name before the equals sign"),
        ("+=5", "no name before the equals sign"),
    ],
)
def test_what_is_neither_flag_nor_setting_is_told(conf: Path, argument: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        prepared(["seed=1", argument], conf)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_value_may_be_as_long_as_it_likes(conf: Path) -> None:
    for argument in (f"budget.sparsity={','.join(['0.1000'] * 200)}", f"model=org/{'x' * 5000}"):
        check_choices(prepared(["-m", argument], conf), conf)


@pytest.mark.parametrize(
    "argument",
    [
        "model=smollm2,tiny_llama",
        "model=glob(*)",
        "budget.sparsity=0.25,0.5",
        "+experiment=demo",
        "-m",
        "~evaluate",
        "+strategy.elite=2",
    ],
)
def test_everything_else_is_left_to_hydra(conf: Path, argument: str) -> None:
    assert prepared([argument], conf) == [argument]
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
