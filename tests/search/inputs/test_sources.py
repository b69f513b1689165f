"""Where text comes from: topics of pydoc, files, data sets of the hub, and the choices of `data=`."""

import inspect
import json
import re
from pathlib import Path

import hydra.utils
import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from search.inputs.data import PARTS, HubText, LocalText, PydocTopics, prepare
from search.inputs.data.parts import PIECE_CHARACTERS
from supernet.errors import InputError

ONE_SPLIT = dict.fromkeys(PARTS, "all")


def test_no_paragraph_is_in_two_pydoc_topics() -> None:
    documents = list(PydocTopics().documents("topics", seed=0))
    paragraphs = [
        " ".join(paragraph.split())
        for document in documents
        for paragraph in re.split(r"\n\s*\n", document)
        if paragraph.strip()
    ]
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(map(len, documents)) > 300_000
    assert max(map(len, documents)) > PIECE_CHARACTERS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of each kind, one of them in a folder below, and one that is not text."""
    texts = ["row one", "row two"]
    (tmp_path / "plain.txt").write_text("plain\n\ntext", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "json " + t, "id": 1}) for t in texts))
    (tmp_path / "below").mkdir()
    pd.DataFrame({"text": ["parquet " + t for t in texts] + [None]}).to_parquet(tmp_path / "below" / "r.parquet")
    (tmp_path / "notes.md").write_text("not taken")
    return tmp_path


def test_local_text_of_every_kind(folder: Path) -> None:
    def documents(path: Path, seed: int = 0) -> list[str]:
        return list(LocalText(str(path)).documents("path", seed))

    assert documents(folder / "plain.txt") == ["plain\n\ntext"]
    assert sorted(documents(folder / "rows.jsonl")) == ["json row one", "json row two"]
    assert sorted(documents(folder / "below" / "r.parquet")) == ["", "parquet row one", "parquet row two"]
    everything = documents(folder)
    assert len(everything) == 6 and "not taken" not in everything
    assert documents(folder) == everything
    assert {tuple(documents(folder, seed)) for seed in range(8)} != {tuple(everything)}


def test_evaluation_can_have_a_local_text_of_its_own(folder: Path) -> None:
    source = LocalText(str(folder / "rows.jsonl"), evaluation_path=str(folder / "plain.txt"))
    assert source.splits == {"calibration": "path", "search": "path", "evaluation": "evaluation_path"}
    assert list(source.documents("evaluation_path", seed=0)) == ["plain\n\ntext"]
    assert set(LocalText(str(folder)).splits.values()) == {"path"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", r"data.source.path=.* does not exist"),
        ("", b"", r"is a folder without a text file; .*\.txt, \.jsonl, \.parquet"),
        ("a.csv", b"text", r"unknown ending; .*\.txt, \.jsonl, \.parquet"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1 is not an object"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}',
            "no column text; set data.source.text_column to one of: body, id",
        ),
        ("a.jsonl", b'{"text": 1}', "text holds int; set data.source.text_column"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
    ],
)
def test_local_text_that_is_none(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name if name is not None else "absent")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(LocalText(str(path)).documents("path", seed=0))
    assert "\n" not in str(caught.value)


def test_a_parquet_column_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="no column body; set data.source.text_column to one of: text"):
        list(LocalText(str(folder / "below"), text_column="body").documents("path", seed=0))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder that `datasets` reads like a data set of the hub, with 50 rows to train and 5 to test."""
    for split, count in (("train", 50), ("test", 5)):
        rows = [json.dumps({"text": f"{split} {row}\n" if row % 2 else ""}) for row in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_hub_text_is_shuffled_by_the_seed(hub: Path) -> None:
    source = HubText(path=str(hub), splits=ONE_SPLIT)
    first, again, other = (list(source.documents("train", seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert len(first) == 50 and "train 49\n" in first


def test_joined_hub_text_is_one_document_in_order(hub: Path) -> None:
    source = HubText(path=str(hub), splits=ONE_SPLIT, join="\n\n")
    assert list(source.documents("test", seed=3)) == ["\n\ntest 1\n\n\n\n\ntest 3\n\n\n"]


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"path": "nobody/nothing"}, "train", "nobody/nothing, split train, cannot be read .* data=local"),
        ({}, "validation", "split validation, cannot be read .* data=local"),
        ({"text_column": "body"}, "train", "no column body; set data.source.text_column to one of: text"),
    ],
)
def test_hub_text_that_cannot_be_had(hub: Path, changes: dict[str, str], split: str, message: str) -> None:
    source = HubText(**{"path": str(hub), "splits": ONE_SPLIT} | changes)
    with pytest.raises(InputError, match=message) as caught:
        list(source.documents(split, seed=0))
    assert "\n" not in str(caught.value)


def test_the_data_configurations_fit_their_sources(conf: Path) -> None:
    files = sorted((conf / "data").glob("*.yaml"))
    assert {"prose", "generated", "mixed", "pydoc", "local", "wikitext2", "c4", "fineweb_edu"} <= {
        file.stem for file in files
    }
    for file in files:
        assert file.read_text().startswith("# ")
        config = OmegaConf.load(file)
        assert set(config) - {"beside"} == {"defaults", "source", "sequence_length", "sequences"}
        assert config.defaults == ["base/text@_here_", "_self_"]  # data.bos
        assert set(config.sequences) == set(PARTS)
        settings = OmegaConf.to_container(config.source)
        target = hydra.utils.get_object(settings.pop("_target_"))
        inspect.signature(target).bind(**settings)
        assert set(settings.get("splits", ONE_SPLIT)) == set(PARTS)


def test_the_default_data_has_text_for_all_its_sequences(
    conf: Path, byte_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    config = OmegaConf.load(conf / "data" / "pydoc.yaml")
    source = hydra.utils.instantiate(config.source)
    # A token of a language model stands for about four bytes of English.
    parts = prepare(source, byte_tokenizer, config.sequences, 4 * config.sequence_length, seed=0)
    assert {part: tokens.ids.shape[0] for part, tokens in parts.items()} == config.sequences
    assert caplog.records == []
