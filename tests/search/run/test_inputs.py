"""What a run measures on beside its own text ends, whatever its own text takes."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from search.inputs.data import PARTS
from search.inputs.data.sources import SameForAll
from search.run import inputs as module
from search.run.inputs import Inputs
from search.run.ranks import Ranks


class Endless(SameForAll):
    """A text like the validation split of a corpus of the web, or what a model writes."""

    splits = dict.fromkeys(PARTS, "all")

    def documents(self, split: str, seed: int) -> Iterator[str]:
        return (f"The {number}th of all documents." for number in count())


def test_a_further_text_without_end_is_not_read_to_its_end(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("text", "test"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name} has the number {index}." for index in range(600)))
    with initialize_config_dir(str(conf), version_base="1.3"):
        arguments = ["+experiment=smoke", "data=local", f"data.source.path={tmp_path}/text.txt"]
        arguments += [f"data.source.evaluation_path={tmp_path}/test.txt", "data.sequence_length=64"]
        arguments += ["data.sequences={calibration:2,search:2,evaluation:all}", "evaluate.text=[generated]"]
        config = compose("search", arguments)
    monkeypatch.setattr(module, "source_named", lambda name: Endless())
    found = Inputs(config, instantiate(config.prune.pruner), Ranks(), tmp_path)
    assert len(found.tokens["evaluation"].ids) > 100  # all of its own text
    assert found.further_texts["generated"].ids.shape == (64, 64)
