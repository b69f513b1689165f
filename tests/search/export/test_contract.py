"""What every exporter keeps to. A new format is added to EXPORTERS, with how its folder is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from search.export import whole
from search.export.base import Exporter, Pruned
from search.export.check import Sample
from search.export.huggingface import HuggingFace
from search.export.reload import sequence_losses
from search.inputs.models import LoadedModel, random_llama
from supernet.errors import InputError
from supernet.models.assemble import assemble
from supernet.store import Supernet

Load = Callable[[Path], PreTrainedModel]
EXPORTERS: dict[str, tuple[Callable[[], Exporter], Load]] = {
    "huggingface": (HuggingFace, lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)),
}
ALLOCATION = (1, 0, 2, 1, 0, 2, 3, 3)  # block 3 loses attention and MLP
DENSE = random_llama(0, 64, 96, 4, 8, 4, dtype=torch.float32)


@pytest.fixture(scope="module")
def supernet(random_supernet: Callable[[PreTrainedModel], Supernet]) -> Supernet:
    return random_supernet(DENSE.model)


@pytest.fixture
def pruned(supernet: Supernet, byte_tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> Pruned:
    model = assemble(DENSE.model, supernet, ALLOCATION)
    return Pruned(model, supernet, ALLOCATION, byte_tokenizer, torch.float32)


@pytest.fixture(params=EXPORTERS)
def made(request: pytest.FixtureRequest) -> tuple[Exporter, Load]:
    exporter, load = EXPORTERS[request.param]
    return exporter(), load


class TestContract:
    def test_the_folder_holds_the_model_and_the_card(
        self,
        made: tuple[Exporter, Load],
        pruned: Pruned,
        ids: torch.Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        exporter, load = made
        expected = sequence_losses(pruned.model, ids, 0)
        assert exporter.write(pruned, tmp_path / "export", lambda checked: f"# Checked: {checked}\n") is None
        assert (tmp_path / "export/README.md").read_text() == "# Checked: None\n"
        assert sequence_losses(load(tmp_path / "export"), ids, 0) == pytest.approx(expected, rel=1e-5)

    def test_what_the_check_found_is_returned_and_in_the_card(
        self, made: tuple[Exporter, Load], pruned: Pruned, ids: torch.Tensor, tmp_path: Path
    ) -> None:
        losses = tuple(sequence_losses(pruned.model, ids, 0))
        given = vars(pruned) | {"sample": Sample(ids, 0, losses)}
        checked = made[0].write(Pruned(**given), tmp_path / "export", str)
        assert checked is not None and checked.sequences == len(ids)
        assert (tmp_path / "export/README.md").read_text() == str(checked)

    @pytest.mark.parametrize(
        "error",
        [OSError(28, "No space left on device"), SafetensorError("No space left on device"), KeyboardInterrupt()],
        ids=["disk full", "safetensors", "Ctrl-C"],
    )
    @pytest.mark.parametrize("before", [False, True], ids=["new", "in place of an older one"])
    def test_it_appears_whole_or_not_at_all(
        self, made: tuple[Exporter, Load], error: BaseException, before: bool, pruned: Pruned, tmp_path: Path
    ) -> None:
        folder = tmp_path / "export"
        if before:
            folder.mkdir()
            (folder / "older").touch()

        def stop(_: object) -> str:
            raise error  # when all but the card is written

        with pytest.raises(InputError if isinstance(error, Exception) else KeyboardInterrupt):
            made[0].write(pruned, folder, stop)
        assert [path.name for path in tmp_path.iterdir()] == ["export"] * before
        assert (folder / "older").exists() == before

    def test_its_dtype_is_the_checkpoint_s_by_itself(self, made: tuple[Exporter, Load]) -> None:
        stored = LoadedModel(**vars(DENSE) | {"stored_dtype": torch.bfloat16})
        assert made[0].dtype_of(stored) == torch.bfloat16 and made[0].dtype_of(DENSE) == torch.float32


def test_a_folder_that_a_killed_process_set_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".export.old").mkdir()
    (tmp_path / ".export.old/older").touch()
    (tmp_path / ".export.tmp").mkdir()
    with pytest.raises(KeyboardInterrupt), whole.whole(tmp_path / "export"):
        raise KeyboardInterrupt
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["export", "export/older"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"check": 1}, "export.check=1 must be true or false"), ({"dtype": "int4"}, "export.dtype=int4 is not one")],
)
def test_wrong_settings_are_refused_when_it_is_made(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        HuggingFace(**settings)  # type: ignore[arg-type]
