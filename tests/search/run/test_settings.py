"""What a run's directory is bound to, and which texts its models may be measured on besides its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from search.paths import conf_dir
from search.run.settings import check_settings, settings_record
from supernet.errors import InputError


@pytest.fixture(autouse=True)
def at_work() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@pytest.mark.parametrize(
    "other", ["evaluate.prompt=to be", "evaluate.text=[prose]", "evaluate.batch=2", "data.beside=[prose]"]
)
def test_what_is_measured_at_the_end_binds_no_directory(other: str) -> None:
    plain, changed = compose("search", ["+experiment=smoke"]), compose("search", ["+experiment=smoke", other])
    assert plain != changed and settings_record(plain) == settings_record(changed)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (["data=c4"], "c4"),
        (["data=c4", "data.source.shuffle_buffer=10"], "c4"),
        (["data=prose"], "prose"),
        (["data=mixed"], "prose"),  # which it is measured on
        (["data=pydoc"], "pydoc"),
        (["data=local", "data.source.path=pyproject.toml"], "./pyproject.toml"),
    ],
)
def test_the_own_text_of_a_run_is_no_other_one(data: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    check_settings(compose("search", [*data, "model=tiny_llama"]))  # with the texts that it has by default
    with pytest.raises(InputError, match=f"^evaluate.text holds {name}, which is the run's own text.*leave it out"):
        check_settings(compose("search", [*data, "model=tiny_llama", f"evaluate.text=[speeches,{name}]"]))


@pytest.mark.parametrize(("data", "names"), [("mixed", "[generated,c4]"), ("wikitext2", "[c4]"), ("c4", "[wikitext2]")])
def test_any_other_text_is_accepted(data: str, names: str) -> None:
    check_settings(compose("search", [f"data={data}", "model=tiny_llama", f"evaluate.text={names}"]))
