"""The parts never share a text and are what the seed says; a source without text says so in one line."""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from search.inputs.data import PARTS, PydocTopics, TokenSet, held_out, prepare, split_record
from search.inputs.data.encoder import cut
from search.inputs.data.rows import Chat
from supernet.errors import InputError

ONE_SPLIT = dict.fromkeys(PARTS, "all")
OWN_SPLITS = {part: part for part in PARTS}
TEST_SPLIT = ONE_SPLIT | {"evaluation": "test"}


@dataclass(frozen=True)
class Listed:
    """Documents that a test lists, by split."""

    texts: Mapping[str, Sequence[str]]
    splits: Mapping[str, str] = field(default_factory=lambda: ONE_SPLIT)

    def documents(self, split: str, seed: int) -> Iterator[str]:
        return iter(self.texts[split])


def marked(identity: int, lines: int) -> str:
    """A document whose lines tell which they are; the same arguments give the same text."""
    return "".join(f"<{identity}.{lines}.{line}>" + "\n" * (1 + (line % 7 == 0)) for line in range(lines))


def marks(tokenizer: PreTrainedTokenizerBase, tokens: TokenSet) -> list[str]:
    return re.findall(r"<\d+\.\d+\.\d+>", tokenizer.decode(tokens.ids.flatten()))


def each(count: int) -> dict[str, int]:
    return dict.fromkeys(PARTS, count)


# Few identities and few lengths, so that documents recur, in a split and across splits; the longest are cut.
DOCUMENTS = st.lists(st.builds(marked, st.integers(0, 9), st.sampled_from([4, 40, 2_000])), max_size=30)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    splits=st.sampled_from([ONE_SPLIT, OWN_SPLITS, TEST_SPLIT]),
    texts=st.fixed_dictionaries(dict.fromkeys(["all", "test", *PARTS], DOCUMENTS)),
    sequences=st.fixed_dictionaries(dict.fromkeys(PARTS, st.integers(1, 400))),
    seed=st.integers(0, 3),
)
def test_no_text_is_used_twice(
    byte_tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, str],
    texts: Mapping[str, Sequence[str]],
    sequences: Mapping[str, int],
    seed: int,
) -> None:
    try:
        parts = prepare(Listed(texts, splits), byte_tokenizer, sequences, 32, seed)
    except InputError as error:
        assert "more text" in str(error)
        return
    used = [mark for tokens in parts.values() for mark in marks(byte_tokenizer, tokens)]
    assert len(used) == len(set(used))
    for part, tokens in parts.items():
        assert 1 <= tokens.ids.shape[0] <= sequences[part]
        available = {mark for text in texts[splits[part]] for mark in re.findall("<.*?>", text)}
        assert available.issuperset(marks(byte_tokenizer, tokens))


def test_a_further_text_shares_nothing_with_the_run(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [marked(index, 40) for index in range(12)]
    seen = set[int]()
    parts = prepare(Listed({"all": texts[:6]}), byte_tokenizer, each(4), 64, seed=0, seen=seen)
    used = {mark for tokens in parts.values() for mark in marks(byte_tokenizer, tokens)}
    further = held_out(Listed({"all": texts}), byte_tokenizer, 30, 64, seed=0, seen=seen)
    assert len(further.ids) == 30
    assert used.isdisjoint(marks(byte_tokenizer, further))
    with pytest.raises(InputError, match="has 0 tokens that the run is not calibrated on"):
        held_out(Listed({"all": texts[:2]}), byte_tokenizer, 30, 64, seed=0, seen=seen)


def test_a_test_set_stays_whole_and_in_its_order(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    source = Listed({"all": ["x"], "test": [marked(0, 2_000)]}, TEST_SPLIT)
    found = held_out(source, byte_tokenizer, "all", 64, seed=5)
    assert byte_tokenizer.decode(found.ids.flatten()) == marked(0, 2_000)[: found.ids.numel()]


def test_documents_are_joined_with_eos_and_cut(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    source = Listed({part: [f"{part}-1", "  \n", f"{part}-2", f"{part}-1"] for part in PARTS}, OWN_SPLITS)
    parts = prepare(source, byte_tokenizer, each(4), 5, seed=0)
    for part, tokens in parts.items():
        expected = byte_tokenizer(f"{part}-1<|endoftext|>{part}-2")["input_ids"]
        assert byte_tokenizer.eos_token_id in expected
        assert tokens.ids.dtype == torch.int64
        assert tokens.ids.flatten().tolist() == expected[: min(20, len(expected) // 5 * 5)]
        assert tokens.documents == 2


@pytest.fixture
def templated(byte_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedTokenizerBase]:
    """Gives the byte tokenizer a template that puts special tokens around a text: <bos> is 257, <cls> 258."""
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>", "cls_token": "<cls>"})
    tokens = [(token, byte_tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<cls>", "<|endoftext|>")]

    def made(template: str) -> PreTrainedTokenizerBase:
        byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
        return byte_tokenizer

    return made


@pytest.mark.parametrize(
    ("template", "bos", "leading"),
    [
        ("$A", "auto", []),
        ("$A <|endoftext|>", "auto", []),
        ("<bos> $A <|endoftext|>", "auto", [257]),
        ("<cls> <bos> $A", "auto", [258, 257]),
        ("<bos> $A", True, [257]),
        ("$A", True, [257]),
        ("<cls> $A", True, [257, 258]),
        ("<bos> $A", False, []),
    ],
)
def test_every_sequence_begins_as_the_tokenizer_begins_a_text(
    templated: Callable[[str], PreTrainedTokenizerBase], template: str, bos: object, leading: list[int]
) -> None:
    tokenizer = templated(template)
    source = Listed({"all": [marked(i, 40) for i in range(9)]})
    parts = prepare(source, tokenizer, each(2), 32, seed=0, bos=bos)
    bare = prepare(source, templated("$A"), each(2), 32 - len(leading), seed=0)
    for part, tokens in parts.items():
        assert tokens.ids.shape == (2, 32)  # places that leading tokens take are no text's
        assert tokens.ids[:, : len(leading)].tolist() == [leading, leading]
        assert torch.equal(tokens.ids[:, len(leading) :], bare[part].ids)
        assert tokens.leading == split_record(parts)[part]["leading"] == len(leading)
        assert tokens.unscored == max(0, len(leading) - 1)
        assert (tokens.fingerprint == bare[part].fingerprint) == (not leading)


def test_without_a_leading_token_nothing_changes(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Supernets that were built before there was `data.bos` are found again."""
    parts = prepare(Listed({"all": [marked(i, 40) for i in range(9)]}), byte_tokenizer, each(2), 32, seed=0)
    assert parts["calibration"].fingerprint == "68aed8fd77d24cbcce57a67fff545b5b"


@pytest.mark.parametrize(
    ("bos", "message"),
    [
        (True, "data.bos=true, but the model's tokenizer has no BOS token; use data.bos=auto"),
        ("always", "data.bos=always must be auto, true or false"),
        (1, "data.bos=1 must be auto, true or false"),
        (None, "data.bos=None must be auto, true or false"),
    ],
)
def test_a_beginning_that_cannot_be(byte_tokenizer: PreTrainedTokenizerBase, bos: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(PydocTopics(), byte_tokenizer, each(1), 32, seed=0, bos=bos)


@pytest.mark.parametrize(("own", "bos"), [("<bos> $A", "auto"), ("<bos> $A", True), ("$A", True)])
def test_templates_write_no_second_bos(own: str, bos: Any, templated: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = templated(own)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    chat = Chat([{"role": "user", "content": "hello" * 40}], "a.jsonl, line 1")
    source: Any = Listed({part: [chat] for part in PARTS}, OWN_SPLITS)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="evaluation|search|calibration"):
        prepare(source, tokenizer, each(1), 32, seed=0)  # the same in all parts counts once
    chats = {part: [Chat([{"role": "user", "content": part * 40}], part)] for part in PARTS}
    source = Listed(chats, OWN_SPLITS)  # type: ignore[arg-type]
    ids = prepare(source, tokenizer, each(1), 32, 0, bos)["search"].ids
    assert ids.flatten().tolist() == [257, *tokenizer("search" * 40, add_special_tokens=False)["input_ids"][:31]]


def test_leading_tokens_leave_room_for_text(templated: Callable[[str], PreTrainedTokenizerBase]) -> None:
    source, tokenizer = Listed({"all": [marked(i, 40) for i in range(9)]}), templated("<cls> <bos> $A")
    assert prepare(source, tokenizer, each(1), 3, seed=0)["search"].ids.shape == (1, 3)
    with pytest.raises(InputError, match="data.sequence_length=2 leaves no token .* beside the 2 .* give 3 or more"):
        prepare(source, tokenizer, each(1), 2, seed=0)


def test_warnings_of_the_tokenizer_stay_out(
    byte_tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer.model_max_length = 8
    prepare(Listed({"all": [marked(i, 40) for i in range(9)]}), byte_tokenizer, each(2), 32, seed=0)
    assert capfd.readouterr().err == ""


def test_the_seed_decides(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [PydocTopics(), Listed({"all": [marked(0, 30_000)]})]
    for source in sources:
        first, again, other = (prepare(source, byte_tokenizer, each(8), 64, seed) for seed in (1, 1, 2))
        assert split_record(first) == split_record(again)
        assert all(torch.equal(first[part].ids, again[part].ids) for part in PARTS)
        assert all(first[part].fingerprint != other[part].fingerprint for part in PARTS)


def test_an_endless_stream_is_read_only_as_far_as_needed(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    read = []

    class Endless:
        splits = ONE_SPLIT

        def documents(self, split: str, seed: int) -> Iterator[str]:
            for identity in itertools.count():
                read.append(identity)
                yield marked(identity, 10)  # 70 bytes or more

    prepare(Endless(), byte_tokenizer, each(5), 32, seed=0)
    assert len(read) < 3 * (5 * 32 // 70 + 2)


def test_a_split_of_one_part_keeps_its_documents_whole(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = {"all": [marked(i, 400) for i in range(20)], "test": [marked(99, 20_000)]}
    evaluation = prepare(Listed(texts, TEST_SPLIT), byte_tokenizer, each(500), 32, seed=0)["evaluation"]
    assert evaluation.documents == 1
    assert byte_tokenizer.decode(evaluation.ids.flatten()) == texts["test"][0][: 500 * 32]


def test_what_is_too_short_is_shared_by_need(
    byte_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    source = Listed({"all": [marked(i, 20) for i in range(300)]})
    total = sum(len(text) for text in source.texts["all"])
    needs = {"calibration": 4_000, "search": 2_000, "evaluation": 1_000}
    with caplog.at_level(logging.WARNING):
        parts = prepare(source, byte_tokenizer, needs, 32, seed=0)
    for part in PARTS:
        share = parts[part].ids.numel() / total
        assert share == pytest.approx(needs[part] / 7_000, abs=0.01)
    (record,) = caplog.records
    for part in PARTS:
        assert f"{part} {parts[part].ids.shape[0]} of {needs[part]}" in record.message


def test_enough_text_gives_what_was_asked_for_and_no_warning(
    byte_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    needs = {"calibration": 7, "search": 300, "evaluation": 40}
    parts = prepare(PydocTopics(), byte_tokenizer, needs, 128, seed=0)
    assert {part: tuple(parts[part].ids.shape) for part in PARTS} == {p: (n, 128) for p, n in needs.items()}
    assert caplog.records == []
    record = split_record(parts)
    assert json.loads(json.dumps(record)) == record
    assert record["search"] == {
        "documents": parts["search"].documents,
        "sequences": 300,
        "tokens": 38_400,
        "leading": 0,
        "fingerprint": parts["search"].fingerprint,
    }


@pytest.mark.parametrize(
    ("sequences", "length", "message"),
    [
        (
            each(1),
            10_000,
            r"data.sequence_length=10000 is more than the \d+ tokens .* smaller .* or more text",
        ),
        (each(1), 1, "data.sequence_length=1 .* give 2 or more"),
        (each(1) | {"search": 0}, 8, "data.sequences.search=0 .* give 1 or more"),
        ({"calibration": 1}, 8, "data.sequences.search=None"),
    ],
)
def test_requests_that_cannot_be_met(
    byte_tokenizer: PreTrainedTokenizerBase, sequences: dict[str, int], length: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(Listed({"all": [marked(i, 20) for i in range(9)]}), byte_tokenizer, sequences, length, seed=0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    byte_tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        prepare(PydocTopics(), byte_tokenizer, each(1), 32, seed=0)


def test_all_of_a_split_is_evaluated(byte_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    texts = {"all": [marked(i, 400) for i in range(20)], "test": [marked(98, 900), marked(99, 700)]}
    asked: dict[str, int | str] = {"calibration": 5, "search": 5, "evaluation": "all"}
    found = prepare(Listed(texts, TEST_SPLIT), byte_tokenizer, asked, 32, seed=0)["evaluation"]
    joined = "<|endoftext|>".join(texts["test"])
    whole = byte_tokenizer(joined)["input_ids"]
    assert found.ids.flatten().tolist() == whole[: len(whole) // 32 * 32]
    assert caplog.records == []
    with pytest.raises(InputError, match="evaluation=all needs a text of its own; .*evaluation_path"):
        prepare(Listed(texts), byte_tokenizer, asked, 32, seed=0)
    with pytest.raises(InputError, match="data.sequences.search=all is only for the evaluation"):
        prepare(Listed(texts, OWN_SPLITS), byte_tokenizer, each(1) | {"search": "all"}, 32, seed=0)


@given(text=st.text(alphabet="ab \n", max_size=400), limit=st.integers(4, 50))
def test_pieces_together_are_the_text(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aaaa\n\nbb\ncc dd", ["aaaa\n\n", "bb\ncc dd"]),
        ("aaaa b\ncc dd", ["aaaa b\n", "cc dd"]),
        ("aaaa bbbbbb", ["aaaa ", "bbbbbb"]),
        ("aaaaaaaaaaa", ["aaaaaaaa", "aaa"]),
    ],
)
def test_a_cut_prefers_blank_lines_then_line_ends_then_spaces(text: str, pieces: list[str]) -> None:
    assert list(cut(text, 8)) == pieces
