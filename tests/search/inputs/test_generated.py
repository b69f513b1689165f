"""What the model writes is drawn from its own predictions, is the same for the same seed, and is written once."""

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from search.inputs.data import GeneratedText, MixedText, prepare
from search.inputs.data import generated as module
from search.inputs.data.generated import chat_beginning, pieces_of, plain_beginning, repeats
from search.inputs.models import LoadedModel
from search.paths import CACHE_VARIABLE
from supernet.errors import InputError

CPU = torch.device("cpu")
TEMPLATE = "{% for message in messages %}<|endoftext|>{{ message.role }}: {{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, "ROWS", 3)
    return tmp_path


@pytest.fixture
def source(tiny_llama: LoadedModel) -> GeneratedText:
    return GeneratedText(tokens=24).for_model(tiny_llama, CPU)


def first(source: GeneratedText, seed: int = 0, count: int = 5) -> list[str]:
    return list(islice(source.documents("all", seed), count))


def test_every_token_follows_from_all_before_it(any_model: PreTrainedModel, tiny_llama: LoadedModel) -> None:
    """At a temperature near 0 the likeliest token is drawn: the one that a pass over the whole row predicts."""
    writer = replace(tiny_llama, model=any_model)
    cold = GeneratedText(temperature=1e-4, tokens=16)
    rows = cold._sampled(writer, [5, 7], 2, torch.Generator().manual_seed(0))
    whole = torch.cat([torch.tensor([[5, 7]] * 2), rows], dim=1)
    with torch.no_grad():
        predicted = any_model(whole).logits[:, 1:-1].argmax(-1)
    assert rows.shape == (2, 16)
    assert torch.equal(rows, predicted)


def test_tokens_are_drawn_as_often_as_the_model_predicts_them() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    for source, expected in (
        (GeneratedText(), [0.5, 0.25, 0.15, 0.1]),
        (GeneratedText(temperature=0.5), [0.7246, 0.1812, 0.0652, 0.0290]),  # squares, normalised
        (GeneratedText(top_p=0.7), [2 / 3, 1 / 3, 0.0, 0.0]),
    ):
        found = source._drawn(logits, generator).flatten().bincount(minlength=4) / len(logits)
        assert found.tolist() == pytest.approx(expected, abs=0.015)


def test_the_seed_decides_what_is_written(
    source: GeneratedText, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    once = first(source, seed=1)
    assert len(set(once)) == len(once)
    assert set(once).isdisjoint(first(source, seed=2))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another"))
    assert first(source, seed=1) == once


def test_a_text_is_written_once(source: GeneratedText, monkeypatch: pytest.MonkeyPatch) -> None:
    once = first(source)
    monkeypatch.setattr(GeneratedText, "_sampled", None)  # nothing is written any more
    assert first(source) == once


@pytest.mark.parametrize("change", ["temperature", "top_p", "tokens", "model"])
def test_other_settings_and_other_models_have_a_text_of_their_own(source: GeneratedText, change: str) -> None:
    assert source.writer is not None
    other = replace(source.writer, fingerprint="another")
    changed = (
        source.for_model(other, CPU)
        if change == "model"
        else replace(source, **{change: 25 if change == "tokens" else 0.5})
    )
    assert changed._folder(changed.writer or other, 0) != source._folder(source.writer, 0)


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_a_damaged_text_is_made_again_and_told(
    source: GeneratedText, own_cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    once = first(source, count=2)
    (file,) = (own_cache / "texts").glob("*/00000.json")
    whole = file.read_text()
    file.write_text(
        {"cut": whole[:-9], "changed": whole.replace(": [", ": [1, "), "foreign": '{"texts": ["x"]}'}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert first(source, count=2) == once
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(file) in line and "made again" in line
    assert file.read_text() == whole


def test_parts_are_filled_without_end(source: GeneratedText) -> None:
    assert source.writer is not None
    sequences = {"calibration": 5, "search": 3, "evaluation": 2}
    parts = prepare(source, source.writer.tokenizer, sequences, 20, seed=0)
    assert {part: len(tokens.ids) for part, tokens in parts.items()} == sequences


def test_it_writes_in_the_language_of_the_model(tiny_llama: LoadedModel) -> None:
    words = "η γάτα κοιμάται στον ήλιο και ο σκύλος τρέχει προς τη θάλασσα χωρίς να κοιτάξει πίσω του".split()
    vocabulary = {word: index for index, word in enumerate(["</s>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    greek = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    tiny_llama.model.resize_token_embeddings(len(vocabulary))
    found = first(GeneratedText(tokens=40).for_model(replace(tiny_llama, tokenizer=greek), CPU), count=2)
    assert len(set(" ".join(found).split())) > 8 and set(" ".join(found).split()) <= set(words)


def test_a_row_is_parted_where_the_model_begins_anew() -> None:
    one, other = list(range(20, 50)), list(range(50, 70))
    assert list(pieces_of([*one, 0, 0, *other, 0, 21, 22], special=[0, 1])) == [one, other]
    assert list(pieces_of([*one, 0, *[7] * 40], special=[0])) == [one]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3] * 20, True), (list(range(40)), False), ([5] * 40, True), (list(range(10)), True), ([], True)],
)
def test_what_repeats_itself_is_no_document(tokens: list[int], expected: bool) -> None:
    assert repeats(tokens) is expected


def test_nothing_but_repetitions_is_an_error(source: GeneratedText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeneratedText, "_sampled", lambda *_: torch.full((3, 24), 65))
    with pytest.raises(InputError, match="nothing but repetitions.*data=prose"):
        first(source)


def test_a_model_that_writes_the_same_again_and_again_is_an_error(
    source: GeneratedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GeneratedText, "_sampled", lambda *_: torch.arange(65, 89).expand(3, -1))
    found = source.documents("all", 0)
    assert len(next(found)) == 24
    with pytest.raises(InputError, match="nothing but repetitions"):
        next(found)


def test_logits_that_are_not_finite_are_an_error(source: GeneratedText) -> None:
    assert source.writer is not None
    with torch.no_grad():
        next(source.writer.model.parameters())[:] = torch.nan
    with pytest.raises(InputError, match=f"{source.writer.name}: logits are not finite; check.*dtype=float32"):
        first(source)


def test_the_model_goes_back_to_where_it_was_even_after_an_error(
    source: GeneratedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source.writer is not None
    model, moves = source.writer.model, list[str]()

    def fail(*_: object) -> None:
        raise InputError("full")

    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)) or model)
    monkeypatch.setattr(GeneratedText, "_continued", fail)
    with pytest.raises(InputError, match="full"):
        first(replace(source, device=torch.device("meta")))
    assert moves == ["meta", "cpu"]


def test_what_errors_call_the_source_is_short(source: GeneratedText) -> None:
    assert source.writer is not None
    assert str(source) == "GeneratedText(temperature=1.0, top_p=1.0, tokens=24, chat=0.0)"
    mixed = MixedText(["pydoc", "generated"]).for_model(source.writer, CPU)
    assert str(mixed) == "MixedText(texts=['pydoc', 'generated'])"


def test_a_dry_run_writes_nothing_and_tells_how_much_a_run_would(
    source: GeneratedText, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_cache: Path
) -> None:
    assert source.writer is not None
    monkeypatch.setattr(GeneratedText, "_sampled", None)
    dry = GeneratedText(tokens=24).for_model(source.writer, CPU, writes=False)
    with caplog.at_level(logging.INFO):
        parts = prepare(dry, source.writer.tokenizer, {"calibration": 5, "search": 3, "evaluation": 2}, 200, seed=0)
    assert [len(tokens.ids) for tokens in parts.values()] == [5, 3, 2]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"text: {source.writer.name} will write about ") and line.endswith(" tokens first")
    assert not any(own_cache.iterdir())


def test_a_dry_run_takes_what_is_cached(source: GeneratedText) -> None:
    assert first(replace(source, writes=False), count=2) != first(source, count=2)
    assert first(replace(source, writes=False), count=2) == first(source, count=2)


def test_a_chat_begins_with_what_stands_before_the_first_question(source: GeneratedText) -> None:
    assert source.writer is not None
    tokenizer = source.writer.tokenizer
    assert chat_beginning(tokenizer) is None
    assert plain_beginning(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(chat_beginning(tokenizer)) == "<|endoftext|>user: "
    texts = first(replace(source, chat=0.7), count=3)
    assert [text.startswith("<|endoftext|>user: ") for text in texts] == [True, True, False]


def test_a_template_that_fails_is_told(source: GeneratedText, caplog: pytest.LogCaptureFixture) -> None:
    assert source.writer is not None
    source.writer.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert chat_beginning(source.writer.tokenizer) is None
    assert "no conversations are written" in caplog.text and "no system message" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"temperature": "hot"}, "temperature=hot must be a number, such as 1.0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"chat": 2}, "chat=2 must be a share"),
        ({"tokens": 3}, "tokens=3 must be a whole number of at least 16"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GeneratedText(**settings)  # type: ignore[arg-type]
