"""Text files are read as far as they are asked for, and what is no text is told in one line with its place."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from search.inputs.data import PARTS, HubText, LocalText, prepare, split_record
from search.inputs.data import files as module
from search.inputs.data.encoder import Encoder
from search.inputs.data.rows import Chat, Document
from supernet.errors import InputError

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def documents(path: Path, column: str = "text", seed: int = 0) -> list[Document]:
    return list(LocalText(str(path), column).documents("path", seed))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of kilobytes is a large one."""
    for name, size in {"LARGE": 2048, "SECTION": 512, "BLOCK": 1024, "WINDOW": 64, "ROWS": 8}.items():
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "hello \\ud800 world"}',
            "a.jsonl, line 2 holds U.D800, half of a surrogate pair",
        ),
        ("a.jsonl", b"\n" + b'{"a":' * 100_000, "a.jsonl, line 2 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl, line 1 is not JSON .*one object a line"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "a.jsonl, line 2 .* not UTF-8"),
        ("a.jsonl", b'{"text": "a\0"}', "a.jsonl, line 1 holds a NUL byte"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl .*UTF-16.*iconv -f UTF-16"),
        ("a.jsonl", b'{"text": [1, 2]}', "a.jsonl, line 1: text is a list, but not of chat messages"),
        ("a.jsonl", b'{"text": [{"from": "human"}]}', "a.jsonl, line 1: text is a list, but not of chat messages"),
        (
            "a.jsonl",
            b'{"txt": "a", "id": 1}',
            "no column text; set data.source.text_column to one of: txt, id .did you mean txt",
        ),
        ("a.txt", b"one\ntwo\ncaf\xe9", "a.txt, line 3 .*byte 0xe9.* not UTF-8; convert it"),
        ("a.txt", b"one\ntwo\0", "a.txt, line 2 holds a NUL byte"),
        ("a.txt", "text".encode("utf-16"), "a.txt .*UTF-16.*iconv -f UTF-16"),
        ("a.txt", "text".encode("utf-32"), "a.txt .*UTF-32.*iconv -f UTF-32"),
        ("a.parquet", b"PAR1" * 9, "a.parquet cannot be read"),
        ("a.txt.gz", b"", "unknown ending; it is compressed: unpack it"),
        ("a.jsonl.zst", b"", "unknown ending; it is compressed: unpack it"),
        ("a.json", b"{}", "unknown ending; .* call it .jsonl"),
    ],
)
def test_what_is_no_text_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.jsonl.gz").touch()
    for path, words in ((tmp_path / "pipe.txt", "is a named pipe"), (Path(os.devnull), "is a device")):
        with pytest.raises(InputError, match=words):
            documents(path)
    with pytest.raises(InputError, match=r"without a text file \(of its files 1 are compressed"):
        documents(tmp_path)


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    rows = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\u0000"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert sorted(map(str, documents(tmp_path / "a.jsonl"))) == ["one", "two\0"]
    assert documents(tmp_path / "a.txt") == ["one\ntwo\nthree"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("text", ["zwölf Wörter\nje Zeile " * 300, "äöüß" * 3000, "€" * 5000, " " * 3000 + "x"])
def test_sections_of_a_large_file_are_all_of_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    sections = [str(document) for document in documents(tmp_path / "a.txt", seed=3)]
    assert len(sections) > 5
    assert Counter("".join(sections)) == Counter(text)
    assert all(section in text and len(section.encode()) < 1200 for section in sections)
    assert documents(tmp_path / "a.txt", seed=4) != sections == documents(tmp_path / "a.txt", seed=3)


@pytest.mark.usefixtures("small_pieces")
def test_rows_of_a_large_file_are_all_there_once(tmp_path: Path) -> None:
    rows = [{"text": f"row {row} " + "ä" * (row % 90)} for row in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=row["text"][-1] != "ä") for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet", row_group_size=40)
    for name in ("a.jsonl", "a.parquet"):
        found = documents(tmp_path / name)
        assert sorted(map(str, found)) == sorted(row["text"] for row in rows)
        assert documents(tmp_path / name) == found != documents(tmp_path / name, seed=1)


@pytest.mark.usefixtures("small_pieces")
def test_a_broken_row_of_a_large_file_has_its_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {row}"}) for row in range(300)]
    lines[216] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="a.jsonl, line 217 is not JSON"):
        documents(tmp_path / "a.jsonl")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shift", range(14))
def test_of_a_long_row_the_beginning_counts(tmp_path: Path, shift: int) -> None:
    """Wherever the cut falls: within an escape, or between the halves of a surrogate pair."""
    text = "x" * shift + '€"\\\n😀' * 2000
    rows = [json.dumps({"id": [1, {"a": "b"}], "text": text, "more": 1}), json.dumps({"text": "short"})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = sorted(map(str, documents(tmp_path / "a.jsonl")), key=len)
    assert found[0] == "short"
    assert text.startswith(found[1]) and len(found[1]) > 100
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 9000}))
    with pytest.raises(InputError, match="b.jsonl, line 1 .*no column|b.jsonl, line 1 is not JSON"):
        documents(tmp_path / "b.jsonl", column="body")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "one row"])
def test_the_work_follows_the_need(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of 20 MB for 1,024 tokens, no more than a share is read or encoded."""
    text = "".join(f"line {number} of a long text\n" for number in range(700_000))
    path = tmp_path / ("a.txt" if kind == "txt" else "a.jsonl")
    rows = [{"text": text}] if kind == "one row" else [{"text": line} for line in text.split("\n")]
    path.write_text(text if kind == "txt" else "\n".join(map(json.dumps, rows)))
    assert path.stat().st_size > module.LARGE
    counted: Counter[str] = Counter()

    def counting(name: str, function: Any, argument: int) -> Any:
        def counted_call(*arguments: Any) -> Any:
            counted[name] += len(arguments[argument])
            return function(*arguments)

        return counted_call

    monkeypatch.setattr(Encoder, "_encoded", counting("encoded", Encoder._encoded, 1))
    monkeypatch.setattr(module, "_text", counting("read", module._text, 0))
    monkeypatch.setattr(module, "_row", counting("read", module._row, 0))
    parts = prepare(LocalText(str(path)), byte_tokenizer, {"calibration": 8, "search": 6, "evaluation": 2}, 64, 0)
    assert {part: len(tokens.ids) for part, tokens in parts.items()} == {"calibration": 8, "search": 6, "evaluation": 2}
    assert counted["read"] <= {"txt": 4 * module.SECTION, "jsonl": 2 * module.BLOCK, "one row": 3 * module.LARGE}[kind]
    assert counted["encoded"] <= 4 * 16_384


def test_a_beginning_is_encoded_as_the_whole(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(f"word {number} " for number in range(20_000))
    encode = Encoder.of(byte_tokenizer)
    assert encode(text, 5_000) == encode(text, np.inf)[:5_000]
    assert len(encode(text, np.inf)) == len(text)
    assert len(encode("short", 5_000)) == 5


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_chats_go_through_the_chat_template(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [
        {"messages": [{**message, "content": f"{message['content']} {row}"} for message in MESSAGES]}
        for row in range(9)
    ]
    if ending == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="no column text; set data.source.text_column to one of: messages"):
        documents(path)
    source = LocalText(str(path), "messages")
    assert all(isinstance(document, Chat) for document in source.documents("path", 0))
    with pytest.raises(
        InputError, match=r"a\.\w+.* holds chat messages, but the model's tokenizer has no chat template"
    ):
        prepare(source, byte_tokenizer, dict.fromkeys(PARTS, 2), 16, 0)
    byte_tokenizer.chat_template = TEMPLATE
    found = prepare(source, byte_tokenizer, dict.fromkeys(PARTS, 2), 16, 0)
    assert byte_tokenizer.decode(found["search"].ids.flatten()).startswith("<user>Who? ")
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"a\.\w+.* does not fit the chat template .*roles must alternate"):
        prepare(source, byte_tokenizer, dict.fromkeys(PARTS, 2), 16, 0)


def test_chats_of_a_data_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    source = HubText(path=str(tmp_path), splits=dict.fromkeys(PARTS, "train"), text_column="messages")
    (chat,) = source.documents("train", 0)
    assert isinstance(chat, Chat) and chat.messages == MESSAGES


@pytest.mark.parametrize(
    ("field", "value"),
    [("path", 5), ("path", None), ("path", ["a"]), ("path", " "), ("text_column", None), ("evaluation_path", 5)],
)
def test_fields_of_local_text_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"data.source.{field}=.* must be"):
        LocalText(**{"path": "text.txt"} | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", None),
        ("name", 5),
        ("splits", None),
        ("splits", {"calibration": "train"}),
        ("splits", dict.fromkeys(PARTS)),
        ("text_column", 5),
        ("join", 5),
        ("shuffle_buffer", 0),
        ("shuffle_buffer", "many"),
    ],
)
def test_fields_of_hub_text_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"data.source.{field}.* must "):
        HubText(**{"path": "name", "splits": dict.fromkeys(PARTS, "train")} | {field: value})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "spaces", "one row"])
def test_a_gigabyte_takes_neither_memory_nor_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.jsonl" if kind == "one row" else "a.txt")
    with path.open("w") as file:
        file.write('{"text": "' if kind == "one row" else "")
        for number in range(1_000):
            piece = " " * 1_000_000 if kind == "spaces" else f"Piece {number} is made of words. " * 40_000
            file.write(piece[:1_000_000])
        file.write('"}' if kind == "one row" else "")
    program = f"""
import resource, time, torch
from search.inputs.data import *
from search.inputs.models import random_llama
tokenizer = random_llama(0, 32, 32, 1, 2, 1, dtype=torch.float32).tokenizer
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try:
    prepare(LocalText({str(path)!r}), tokenizer, {{"calibration": 8, "search": 6, "evaluation": 2}}, 64, 0)
except Exception as error:
    assert "holds no text" in str(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - begun)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kilobytes, seconds = map(float, out.split()[-2:])
    assert kilobytes < 1_000_000 and seconds < 60


def test_the_same_seed_gives_the_same_parts_of_large_files(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, small_pieces: None
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(3_000)))
    source, needs = LocalText(str(tmp_path)), dict.fromkeys(PARTS, 20)
    first, again, other = (prepare(source, byte_tokenizer, needs, 32, seed) for seed in (1, 1, 2))
    assert split_record(first) == split_record(again) != split_record(other)
    lines = [set(byte_tokenizer.decode(tokens.ids.flatten()).split("\n")[1:-1]) for tokens in first.values()]
    assert not any(a & b for index, a in enumerate(lines) for b in lines[index + 1 :])
