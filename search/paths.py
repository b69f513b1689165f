"""Where the application's own files are: the configuration that ships with it, its cache, and the folders of runs."""

import os
import re
from hashlib import sha256
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CACHE_VARIABLE = "SPARSITY_SEARCH_CACHE"
LONGEST = 80  # characters of a folder's name; file systems take 255 bytes


def conf_dir() -> Path:
    """The root of the Hydra configuration: inside an installed package, else the checkout's `conf`."""
    package = Path(__file__).resolve().parent
    shipped = package / "_conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def cache_dir() -> Path:
    """What is costly to make is kept here: $SPARSITY_SEARCH_CACHE, else `~/.cache/sparsity-search`."""
    # An empty variable means "not set": it would otherwise put the cache into whatever folder the run starts
    # from.
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/sparsity-search").expanduser()


def folder_name(overrides: str) -> str:
    """A run's folder after its overrides, "a=1,b=2": another name for other overrides, whatever they hold.

    What no folder should be called, or would be too long, is replaced or cut off; a hash then tells such names apart.
    """
    unquoted = re.sub("""['"]""", "", overrides)
    name = re.sub(r"[^\w=.,+@-]", "_", unquoted).strip(".")
    if name == unquoted and len(name.encode()) <= LONGEST:
        return name or "adhoc"
    cut = name.encode()[:LONGEST].decode(errors="ignore")
    return f"{cut}-{sha256(overrides.encode()).hexdigest()[:8]}"


def _run_name(*, _root_: DictConfig) -> str:
    """Of the experiment, or of the overrides where there is none."""
    experiment = OmegaConf.select(_root_, "hydra.runtime.choices.experiment")
    return str(experiment) if experiment is not None else _job_name(_root_=_root_)


def _job_name(*, _root_: DictConfig) -> str:
    return folder_name(OmegaConf.select(_root_, "hydra.job.override_dirname") or "")


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("job_name", _job_name, replace=True)
