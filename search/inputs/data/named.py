"""Text sources by name: those of `conf/data`, as the command line knows them, and files and folders."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from search.errors import nearest
from search.inputs.data.sources import LocalText, TextSource
from search.paths import conf_dir
from supernet.errors import InputError

INSTEAD_OF_ALL = 64  # sequences; as many as most experiments measure on


def check_name(name: object, setting: str) -> None:
    """Raise InputError for a name that `source_named` does not know; `setting` is where the user wrote it."""
    known = _known()
    if type(name) is not str or not name:
        raise InputError(f"{setting} holds {name}, which is no name of a text; choose from {', '.join(sorted(known))}")
    if name not in known and not Path(name).expanduser().exists():
        raise InputError(
            f"{setting} holds {name}, which is no text of conf/data (did you mean {nearest(name, known)}?), and no "
            "file or folder"
        )


def source_named(name: str) -> TextSource:
    """Return the source of a text of `conf/data`, or of a file or folder."""
    if name not in _known():
        return LocalText(name)
    source: TextSource = instantiate(OmegaConf.load(conf_dir() / "data" / f"{name}.yaml").source)
    return source


def evaluation_sequences(name: str, asked: int | str) -> int | str:
    """Return how many sequences of a text models are measured on, beside the run's own text.

    A number counts for every text. "all" would have no end with a text of the web, or one that the model writes, so
    that it only counts for those of `conf/data` that take all of their evaluation's split themselves, as `wikitext2`
    does. The others then give `INSTEAD_OF_ALL` sequences.
    """
    if asked != "all":
        return asked
    own = OmegaConf.load(conf_dir() / "data" / f"{name}.yaml").sequences.evaluation if name in _known() else None
    return "all" if own == "all" else INSTEAD_OF_ALL


def _known() -> set[str]:
    """All texts of `conf/data` but the one whose path is to be given: there the path itself is the name."""
    return {path.stem for path in (conf_dir() / "data").glob("*.yaml")} - {"local"}
