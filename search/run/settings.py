"""The settings of a run: checked before any work is done, and what of them is recorded in its directory.

What a strategy, a pruner, a budget, a tracker or a source of text takes, each checks itself; here is what the run
itself reads, and the types that the classes of components name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from local_prune.walk import VERSION
from search.budgets import settings as budgets
from search.inputs.data.named import check_name
from search.paths import conf_dir
from search.run.recorded import recorded
from search.values import check_number, check_whole
from supernet.errors import InputError

# Whole numbers: the least that makes sense, and the most that can end: more would hang, or take all memory, before
# anything else could object.
WHOLE = {
    "rounds": (1, 16),  # each halves the spacing of levels: of 0.125 nothing is left after so many
    "seed": (0, 2**63 - 1),
    "data.sequence_length": (2, 1 << 24),
    "data.sequences.calibration": (1, 10**7),
    "data.sequences.search": (1, 10**7),
    "supernet.levels": (2, 4097),
    "evaluate.batch": (1, 10**6),
}
NUMBERS = {"supernet.step": 0.125, "supernet.lowest": 0.0}  # with an example
WORDS = {"device": "a device such as auto, cpu or cuda:1", "dtype": "auto, bfloat16, float16 or float32"}
SWITCHES = ("dry_run", "fresh")
# What an attribute of a dataclass may be, by its type, and that in words.
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}
# These may change between runs in the same directory.
FREE = ("stages", "dry_run", "fresh", "run_name", "device", "evaluator", "tracker")


def check_settings(config: DictConfig) -> None:
    """InputError for the first setting of a wrong type, or below what makes sense."""
    for key in sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"{key} is not given; add {key}=VALUE to the command")
    if not isinstance(config.data.sequences, DictConfig):
        parts = "{calibration: 64, search: 64, evaluation: 32}"
        raise InputError(
            f"data.sequences={config.data.sequences} must say how many each part gets: 'data.sequences={parts}'"
        )
    for key, (least, most) in WHOLE.items():
        check_whole(key, _value(config, key), least, most)
    evaluation = _value(config, "data.sequences.evaluation")
    if evaluation != "all":
        check_whole("data.sequences.evaluation", evaluation, *WHOLE["data.sequences.search"])
    for name in ("batch", "multiple"):  # not every method has them
        if name in config.prune:
            check_whole(f"prune.{name}", config.prune[name], 1, 10**6)
    _check_words(config)
    for key, example in NUMBERS.items():
        check_number(key, _value(config, key), example)
    budgets.check_budget(config.budget)
    _check_texts(config)
    for key in SWITCHES:
        value = _value(config, key)
        if type(value) is not bool:
            raise InputError(f"{key}={value} must be true or false")


def _check_texts(config: DictConfig) -> None:
    """InputError for a further text that there is not, or that the run has for its own."""
    names = _value(config, "evaluate.text")
    if not isinstance(names, ListConfig):
        raise InputError(f"evaluate.text={names} must be a list of texts to measure on besides, such as [wikitext2,c4]")
    for name in names:
        check_name(name, "evaluate.text")
        if _is_source(name, config.data.source):
            raise InputError(
                f"evaluate.text holds {name}, which is the run's own text: that is measured on in any case; leave it "
                "out, as in evaluate.text=[]"
            )


def _is_source(name: str, source: DictConfig) -> bool:
    """Whether a text's name stands for what a source gives to measure on."""
    texts = source.get("texts")
    if isinstance(texts, ListConfig):  # of a mixture all but the calibration is of the first
        return name in texts[:1]
    file = conf_dir() / "data" / f"{name}.yaml"
    if not file.exists():
        path = source.get("path")
        return isinstance(path, str) and Path(name).expanduser().resolve() == Path(path).expanduser().resolve()
    known = OmegaConf.load(file).source
    return all(known.get(key) == source.get(key) for key in ("_target_", "path", "name", "texts"))


def _check_words(config: DictConfig) -> None:
    """InputError for what should be a word or a path and is not."""
    for key, example in WORDS.items():
        value = _value(config, key)
        if type(value) is not str or not value:
            raise InputError(f"{key}={value} must be {example}")
    prompt = _value(config, "evaluate.prompt")
    if prompt is not None and (type(prompt) is not str or not prompt.strip()):
        raise InputError(f"evaluate.prompt={prompt} must be a few words to go on with, or null for none")
    root = _value(config, "supernet.root")
    if root is not None and (type(root) is not str or not root):
        raise InputError(f"supernet.root={root} must be a folder, or null for the cache")


def check_types(config: DictConfig, key: str) -> None:
    """InputError where a value of the component at `key` is not of the type that its dataclass names.

    Python itself would take any value, and fail much later.
    """
    component = OmegaConf.select(config, key)
    target = locate(str(component.get("_target_")))
    for field in fields(target) if isinstance(target, type) and is_dataclass(target) else ():
        kinds, words = TYPES.get(getattr(field.type, "__name__", str(field.type)), ((), ""))
        if kinds and field.name in component and type(value := component[field.name]) not in kinds:
            raise InputError(f"{key}.{field.name}={value} must be {words}")


def without_effect(config: DictConfig, typed: Collection[str]) -> Iterator[str]:
    """A line for each setting of those `typed` in the command that makes no difference, as others say already."""
    yield from budgets.without_effect(config.budget, typed)
    if "evaluate.batch" in typed and config.evaluator.resident == "blocks":
        streamed = "evaluator.resident=blocks, where text moves through the model as memory allows"
        yield f"evaluate.batch has no effect with {streamed}"
    if "evaluate.prompt" in typed and config.evaluator.resident == "blocks":
        yield "evaluate.prompt has no effect with evaluator.resident=blocks: no whole model is there to generate with"


def settings_record(config: DictConfig) -> dict[str, Any]:
    """What a run's directory keeps of the settings: all that its result depends on."""
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    settings["budget"] = budgets.budget_record(settings["budget"])  # what makes no difference may change, too
    del settings["supernet"]["root"]  # a full disk must not end a run: supernets may move
    settings["fitness"].pop("chunk_bytes", None)  # nor must a lack of memory
    settings["prune"].pop("batch", None)
    settings["export"].pop("check", None)
    del settings["evaluate"]  # the stage itself tells what it measured from what is asked for
    settings["data"].pop("beside", None)
    settings["prune"]["walk"] = VERSION
    return {str(key): recorded(value) for key, value in settings.items() if key not in FREE}


def _value(config: DictConfig, key: str) -> Any:
    """The value at a dotted key; None where one of the groups on the way is not there."""
    return OmegaConf.select(config, key)
