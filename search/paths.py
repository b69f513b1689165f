"""Where the application's own files are: the configuration that ships with it, its cache, and the folders of runs."""

import os
import re
from hashlib import sha256
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CACHE_VARIABLE = "SPARSITY_SEARCH_CACHE"
LONGEST = 80  # characters of a folder's name; file systems take 255 bytes


def conf_dir() -> Path:
    """Return the root of the Hydra configuration: inside an installed package, else the checkout's `conf`."""
    package = Path(__file__).resolve().parent
    shipped = package / "_conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def cache_dir() -> Path:
    """Return the folder for what is costly to make: $SPARSITY_SEARCH_CACHE, else `~/.cache/sparsity-search`."""
    # An empty variable means "not set": it would otherwise put the cache into whatever folder the run starts
    # from.
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/sparsity-search").expanduser()


def folder_name(overrides: str) -> str:
    """Return a name for a run's folder made of its overrides, such as "a=1,b=2"; other overrides get another name.

    Characters that no folder name should have are replaced, and long names are cut off; a hash then tells them apart.
    """
    unquoted = re.sub("""['"]""", "", overrides)
    name = re.sub(r"[^\w=.,+@-]", "_", unquoted).strip(".")
    if name == unquoted and len(name.encode()) <= LONGEST:
        return name or "adhoc"
    cut = name.encode()[:LONGEST].decode(errors="ignore")
    return f"{cut}-{sha256(overrides.encode()).hexdigest()[:8]}"


def _run_name(*, _root_: DictConfig) -> str:
    """Return the name of the experiment, or of the overrides if there is no experiment."""
    experiment = OmegaConf.select(_root_, "hydra.runtime.choices.experiment")
    return str(experiment) if experiment is not None else _job_name(_root_=_root_)


def _job_name(*, _root_: DictConfig) -> str:
    return folder_name(OmegaConf.select(_root_, "hydra.job.override_dirname") or "")


def _text_for(model: str) -> str:
    """The text for a model of `conf/model` where none is chosen: of the web, if the model comes from there itself.

    For a folder it is what the model writes: nobody knows its language, or whether there is a network.
    """
    if model == "folder":
        return "generated"
    file = conf_dir() / "model" / f"{model}.yaml"
    target = str(OmegaConf.select(OmegaConf.load(file), "_target_")) if file.is_file() else ""
    return "c4" if target.endswith(".from_pretrained") else "mixed"


OmegaConf.register_new_resolver("text_for", _text_for, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("job_name", _job_name, replace=True)
