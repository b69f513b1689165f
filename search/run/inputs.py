"""What a run works on and where: the dense model, its text, and the device. Each is loaded when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from local_prune.pruner import Calibration, Pruner
from local_prune.text.dense_stream import DenseStream
from local_prune.text.passes import TextWalk
from search.evaluation.resources import Resources
from search.inputs.data import (
    TextSource,
    TokenSet,
    check_ids,
    check_sequence_length,
    evaluation_sequences,
    held_out,
    prepare,
    source_named,
    split_record,
)
from search.inputs.models import LoadedModel, dtype_of
from search.inputs.models.pretrained import quiet
from search.run.progress import track
from search.run.ranks import Ranks
from search.strategies.base import Dense
from search.values import read_bytes
from supernet.errors import InputError
from supernet.models.architecture import sub_blocks
from supernet.models.assemble import check_family
from supernet.models.forward import check_walk
from supernet.models.prunables import Prunable
from supernet.space import ATTENTION, HEADS, MLP

log = logging.getLogger(__name__)


class Inputs:
    """The dense model and its text, and what follows from them and the pruner."""

    def __init__(self, config: DictConfig, pruner: Pruner, ranks: Ranks, scratch: Path) -> None:
        """Choose the device; nothing is loaded yet.

        Args:
            config: The run's.
            pruner: Says what of the model is prunable.
            ranks: Which device is this process's.
            scratch: Folder of the files that do not outlive the process.

        Raises:
            InputError: There is no such device, or a setting of the evaluator is wrong.
        """
        self._config, self._pruner, self._scratch = config, pruner, scratch
        self._texts_read: set[int] = set()  # hashes
        self.device = ranks.device(str(config.device))
        given = config.evaluator
        memory, cache = (read_bytes(f"evaluator.{key}", given[key]) for key in ("memory", "cache"))
        self.resources = Resources(self.device, str(given.resident), memory, cache, scratch)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The dense model, in main memory: the build lends the device one block at a time."""
        loaded: LoadedModel = instantiate(self._config.model, dtype=dtype_of(str(self._config.dtype), self.device))
        return loaded

    @property
    def dtype(self) -> str:
        """Of the dense model's weights in memory, such as "bfloat16"."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    def model_on_device(self) -> PreTrainedModel:
        """The dense model moved to the device, to measure it; with `evaluator.resident=blocks` it stays where it is."""
        model = self.loaded.model
        if self.resources.resident == "model":
            model.to(self.device)  # type: ignore[arg-type]
        return model

    @cached_property
    def prunables(self) -> tuple[Prunable, ...]:
        """What the pruner prunes of the model; InputError for a model that it cannot prune."""
        model = self.loaded.model
        check_walk(model)
        found = self._pruner.prunables(sub_blocks(model))
        check_family(model, structured=found[0].kind in (ATTENTION, MLP, HEADS))
        return found

    @property
    def has_fixed_levels(self) -> bool:
        """Whether the levels of all units are fixed, as those of patterns, of bit widths and of depth are."""
        return all(one.choices is not None for one in self.prunables)

    @cached_property
    def tokens(self) -> dict[str, TokenSet]:
        """Calibration, search and evaluation tokens."""
        data = self._config.data
        length, seed = int(data.sequence_length), int(self._config.seed)
        check_sequence_length(self.loaded.model, length)
        source = self._for_model(instantiate(data.source))
        parts = prepare(source, self.loaded.tokenizer, dict(data.sequences), length, seed, data.bos, self._texts_read)
        check_ids(self.loaded.model, parts)
        return parts

    @cached_property
    def further_texts(self) -> dict[str, TokenSet]:
        """Held-out tokens of the texts in `evaluate.text`; those that cannot be had are told, and left out."""
        data, seed, found = self._config.data, int(self._config.seed), dict[str, TokenSet]()
        length, read = int(data.sequence_length), self._texts_read
        _ = self.tokens  # which fills what was read
        for name in self._config.evaluate.text:
            try:
                with quiet():
                    source = self._for_model(source_named(name))
                    count = evaluation_sequences(name, data.sequences.evaluation)
                    text = held_out(source, self.loaded.tokenizer, count, length, seed, data.bos, read)
            except InputError as error:
                log.warning("evaluate.text: nothing is measured on %s: %s", name, error)
                continue
            check_ids(self.loaded.model, {name: text})
            found[name] = text
        return found

    def _for_model(self, source: TextSource) -> TextSource:
        """The source with the model, which may have to write the text: on the device, if the whole model is there."""
        whole = self.resources.resident == "model"
        device = self.device if whole else torch.device("cpu")
        return source.for_model(self.loaded, device, writes=not self._config.dry_run)

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration text and how it is used."""
        prune = self._config.prune
        given = {key: prune[key] for key in ("batch", "fit") if key in prune}
        text = self.tokens["calibration"]
        return Calibration(text.ids, **given, unscored=text.unscored)

    @property
    def dense(self) -> Dense:
        """What allocation rules look at."""
        calibration = self.calibration
        return Dense(self.loaded.model, calibration.ids, calibration.batch, self.device)

    @cached_property
    def dense_stream(self) -> DenseStream:
        """The dense model's residual stream of the calibration text: computed in a run's first build."""
        ids, batch = self.calibration.ids, self.calibration.batch
        return DenseStream(TextWalk(self.loaded.model, self.device), ids, batch, self._scratch)

    @cached_property
    def scores(self) -> Mapping[str, Tensor]:
        """What the pruner's survey of the dense model found: once for all supernets of a run."""
        return self._pruner.survey(self.loaded.model, self.calibration, self.device, track)

    @property
    def identity(self) -> dict[str, Any]:
        """What the run works on, and how the text was split."""
        model = {"name": self.loaded.name, "fingerprint": self.loaded.fingerprint, "dtype": self.dtype}
        return {"model": model, "data": split_record(self.tokens)}
