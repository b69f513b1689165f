"""Calibration text is mixed, the rest is of the first text; names are found or answered; every model has a text."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from search.inputs.data import GeneratedText, LocalText, MixedText, PydocTopics, prepare
from search.inputs.data.named import check_name, evaluation_sequences, source_named
from search.inputs.models import LoadedModel
from supernet.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(200):
            (tmp_path / name / f"{index}.txt").write_text(f"<{name}{index}> " * 20)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_all_texts_are_in_the_calibration_and_the_first_in_the_rest(texts: list[str], tiny_llama: LoadedModel) -> None:
    source = MixedText(texts).for_model(tiny_llama, CPU)
    parts = prepare(source, tiny_llama.tokenizer, {"calibration": 40, "search": 10, "evaluation": 10}, 32, seed=0)
    found = {part: tiny_llama.tokenizer.decode(tokens.ids.flatten()) for part, tokens in parts.items()}
    assert 0.7 < found["calibration"].count("<a") / found["calibration"].count("<b") < 1.4
    assert "<b" not in found["search"] + found["evaluation"]
    assert "<a" in found["search"] and "<a" in found["evaluation"]


def test_names_are_those_of_the_command_line_files_and_folders(texts: list[str]) -> None:
    assert isinstance(source_named("pydoc"), PydocTopics)
    assert isinstance(source_named("generated"), GeneratedText)
    assert source_named(texts[0]) == LocalText(texts[0])
    for name, message in (("wikitxt2", "did you mean wikitext2"), ("local", "no text of conf/data"), (3, "no name")):
        with pytest.raises(InputError, match=f"evaluate.text holds {name}.*{message}"):
            check_name(name, "evaluate.text")


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [("wikitext2", "all", "all"), ("c4", "all", 64), ("generated", "all", 64), ("wikitext2", 30, 30), ("c4", 30, 30)],
)
def test_all_is_for_texts_that_take_all_themselves(name: str, asked: int | str, expected: int | str) -> None:
    assert evaluation_sequences(name, asked) == expected


def test_a_file_beside_the_run_is_not_read_to_its_end(texts: list[str]) -> None:
    assert evaluation_sequences(texts[0], "all") == 64


@pytest.mark.parametrize("texts", ["prose", [], ["prse"]])
def test_a_mixture_of_nothing_is_an_error(texts: object) -> None:
    with pytest.raises(InputError, match="data.source.texts"):
        MixedText(texts)  # type: ignore[arg-type]


def test_every_model_has_a_text_that_does_no_harm(conf: Path) -> None:
    """Of the web for models of the hub; never Python's documentation, which only knows Python."""
    found = {}
    with initialize_config_dir(str(conf), version_base="1.3"):
        for file in sorted((conf / "model").glob("*.yaml")):
            config = compose("search", [f"model={file.stem}"])
            found[file.stem] = config.data.source._target_.rpartition(".")[2]
            assert config.evaluate.text, "a second kind of text is measured, too"
        assert compose("search", ["model=llama3_8b", "data=pydoc"]).data.source._target_.endswith("PydocTopics")
        demo = compose("search", ["+experiment=demo"])
    assert "PydocTopics" not in found.values()
    assert found["llama3_8b"] == found["pretrained"] == found["qwen3_8b"] == "HubText"
    assert found["smollm2"] == "MixedText" and found["folder"] == "GeneratedText"
    assert demo.data.source._target_.endswith("MixedText") and demo.evaluate.text == ["speeches"]
