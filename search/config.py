"""Where the application's own files are: the configuration that ships with it, and its cache."""

import os
from pathlib import Path

CACHE_VARIABLE = "SPARSITY_SEARCH_CACHE"


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
