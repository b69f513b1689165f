"""What the stages of a run share: model, text, levels and supernets, each made when it is first needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from local_prune.walk import METHOD, Calibration, Pruner, build
from search.config import cache_dir
from search.data import TokenSet, prepare, split_record
from search.levels import Grid, Mixture
from search.models import LoadedModel
from search.progress import track
from search.run_directory import RunDirectory
from search.strategies.base import Strategy
from supernet.architecture import SubBlock, sub_blocks
from supernet.errors import InputError
from supernet.space import Space
from supernet.store import Supernet

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A run's configuration and directory, and what follows from them."""

    config: DictConfig
    directory: RunDirectory

    @cached_property
    def loaded(self) -> LoadedModel:
        """The dense model, in main memory: the build lends the device one block at a time."""
        dtype = getattr(torch, str(self.config.dtype), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype={self.config.dtype} is not a float dtype of torch; use bfloat16, float16 or float32")
        loaded: LoadedModel = instantiate(self.config.model, dtype=dtype)
        return loaded

    def model_on_device(self) -> PreTrainedModel:
        """The dense model moved to the run's device, for search and evaluation."""
        model = self.loaded.model
        model.to(self.device)  # type: ignore[arg-type]
        return model

    @cached_property
    def device(self) -> torch.device:
        """Where the work is done: `device=auto` takes a GPU if there is one."""
        name = str(self.config.device)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device={name} cannot be used here ({str(error).splitlines()[0]}); use device=cpu") from error
        return torch.device(name)

    @cached_property
    def parts(self) -> tuple[SubBlock, ...]:
        """The model's sub-blocks."""
        return sub_blocks(self.loaded.model)

    @cached_property
    def tokens(self) -> dict[str, TokenSet]:
        """Calibration, search and evaluation tokens."""
        data = self.config.data
        source, sequences = instantiate(data.source), dict(data.sequences)
        return prepare(source, self.loaded.tokenizer, sequences, int(data.sequence_length), int(self.config.seed))

    @property
    def identity(self) -> dict[str, Any]:
        """What the run works on, and how the text was split."""
        model = {"name": self.loaded.name, "fingerprint": self.loaded.fingerprint}
        return {"model": model, "data": split_record(self.tokens)}

    @cached_property
    def strategy(self) -> Strategy:
        """The search."""
        strategy: Strategy = instantiate(self.config.strategy)
        return strategy

    @cached_property
    def pruner(self) -> Pruner:
        """The local pruner."""
        pruner: Pruner = instantiate(self.config.prune.pruner)
        return pruner

    @cached_property
    def grid(self) -> Grid:
        """Levels of all rounds."""
        return Grid(int(self.config.supernet.levels), float(self.config.supernet.step), int(self.config.prune.multiple))

    @cached_property
    def finest_space(self) -> Space:
        """Every level that the last round could reach anywhere: where the uniform baseline is taken from."""
        step = self.grid.step / 2 ** (int(self.config.rounds) - 1)
        return Grid(ceil(1.0 / step - 1e-9) + 1, step, self.grid.multiple).first(self.parts)[0]

    def supernet(self, space: Space, mixture: Mixture, title: str, may_build: bool = True) -> Supernet:
        """The finished supernet of a space: found on disk, continued, or built."""
        prune = self.config.prune
        description = {
            "model": self.loaded.fingerprint,
            "method": METHOD,
            "data": self.tokens["calibration"].fingerprint,
            "prune": OmegaConf.to_container(prune, resolve=True),
            "dtype": str(self.config.dtype),
            "mixture": {name: list(weights) for name, weights in mixture.items()},
        }
        root = self.config.supernet.root
        supernet = Supernet.open_or_create(Path(root).expanduser() if root else cache_dir() / "supernets", space, description)
        if supernet.complete:
            log.info("%s: found in %s", title, supernet.path)
        elif not may_build:
            raise InputError(f"{title}: there is no finished supernet in {supernet.path}; add build to stages")
        else:
            calibration = Calibration(self.tokens["calibration"].ids, int(prune.batch), str(prune.fit))
            model = self.loaded.model
            model.cpu()  # also where a search had it on the device: a resumed run finds it here, and must round alike
            with self.directory.stage("build"):
                build(model, calibration, self.pruner, supernet, mixture, self.device, track, title)
        return supernet
