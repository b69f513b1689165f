"""The one place where errors of other libraries and of the system become our one-line messages."""

import difflib
import errno
import re
import sys
from collections.abc import Iterable

from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from supernet.errors import InputError

# Settings that only other choices have.
ELSEWHERE = {
    "study": "is a tracker's: add tracker=optuna, and tracker.optuna.study=FILE_OR_URL for another than trials.log",
    "tracker.optuna": "is only for tracker=optuna",
    "prune.fit": "is only for the methods that fit weights: prune=obs, sparsegpt, apt or gptq",
    "prune.accumulation": "is only for methods that look at activations; this one does not",
    "prune.multiple": "is only for structured methods: prune=obs, magnitude_sp, wanda_sp, flap, taylor, amp or bonsai",
    "prune.query_heads": "is only for structured methods: "
    "prune=obs, magnitude_sp, wanda_sp, flap, taylor, amp or bonsai",
    "prune.batch": "is only for methods that look at text; this one does not",
}


OTHER_FOLDER = "choose another folder (hydra.run.dir, supernet.root)"
ADVICE = {  # of the system's refusals
    (errno.ENOSPC, errno.EDQUOT): f"free some space, or {OTHER_FOLDER}",
    (errno.EACCES, errno.EPERM, errno.EROFS): f"give the right to write there, or {OTHER_FOLDER}",
    (errno.ENOTDIR, errno.EEXIST): f"a file is in the way; {OTHER_FOLDER}",
    (errno.ENAMETOOLONG,): f"the name is too long; {OTHER_FOLDER}",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
}
MORE_MEMORY = (
    "lower evaluator.memory or evaluator.cache, use evaluator.resident=blocks, or lower prune.batch with fresh=true"
)


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names that are most like a misspelt one, or all of them if none is like it."""
    names = sorted(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names)


def no_setting(key: str, siblings: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Return the message for a setting that does not exist.

    Args:
        key: As it was given, with its groups: "budget.sparsty".
        siblings: What the innermost group has instead.
        elsewhere: Settings of that name in other groups; they come first.
    """
    if key in ELSEWHERE:
        return f"{key} {ELSEWHERE[key]}"
    whole, dot, _ = key.rpartition(".")
    known = [f"{whole}{dot}{one}" for one in siblings if one != "_target_"]
    if not known:
        choice = whole.partition(".")[0]
        return (
            f"there is no setting {key}; did you mean to take another {choice}? this choice of {choice} has none in "
            f"{whole}"
        )
    return f"there is no setting {key}; did you mean {', '.join(elsewhere) or nearest(key, known)}?"


def explained(error: BaseException) -> str | None:
    """Return what an exception means for the user, on one line; None if it can only be a fault of this program.

    The line comes from the first InputError in the chain of causes, or says what can be done about an exception of
    Hydra, OmegaConf or the system.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    told = [str(link) for link in chain if isinstance(link, InputError)]
    told = told or [f"{reason(link)}; {MORE_MEMORY}" for link in chain if _is_out_of_memory(link)]
    told = told or [text for link in chain if (text := _translated(link))]
    if not told and isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        told = [str(error) or type(error).__name__]
    if not told and _is_of_hydra(error):
        told = [f"Hydra does not take one of the settings hydra.* of this command ({reason(error)}); leave it out"]
    return " ".join(told[0].split()) if told else None


def _translated(error: BaseException) -> str:
    """Return what a user can do about an exception; an empty text if nothing, or if a later cause knows more."""
    match error:
        case MissingMandatoryValue(full_key=str(key)):
            return f"{key} is not given; add {key}=VALUE to the command"
        case ConfigKeyError() | ConfigAttributeError() if isinstance(error.parent_node, DictConfig):
            key = str(error.full_key)
            return no_setting(
                key, map(str, error.parent_node), () if "." in key else _ending_in(key, error.parent_node)
            )
        case OverrideParseException():
            quotes = """in quotes within quotes: 'key="value"'"""
            return (
                f"'{error.override}' cannot be read; write key=value, and values of other than plain characters "
                f"{quotes}"
            )
        case InstantiationException():
            return _of_component(str(error))
        case ConfigCompositionException() if found := re.search(
            r"Could not delete from config. '(.*)' does not exist", str(error)
        ):
            return f"there is no {found[1]} to take away; leave out ~{found[1]}"
        case ConfigCompositionException() if found := re.search(r"Error merging override (.*)", str(error)):
            return f"'{found[1]}' is of another kind than the setting's default; python -m search --cfg job shows that"
        case HydraException() if error.__cause__ is None and error.__context__ is None:
            return str(error)
        case OSError():
            return _of_system(error)
        case _:
            return ""


def _ending_in(name: str, node: DictConfig, path: str = "") -> list[str]:
    """Return the settings in groups that have this name: users often leave the group out."""
    found = []
    for key in map(str, node):
        inner = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(inner, DictConfig) and key != "hydra":
            found += _ending_in(name, inner, f"{path}{key}.")
        elif path and key == name:
            found.append(f"{path}{key}")
    return found


def _of_component(text: str) -> str:
    """Return what Hydra's report of a component that could not be made means.

    Such reports look like this: `Error in call to target 'a.b': TypeError("...") full_key: c`.
    """
    found = re.match(
        r"Error (?:in call to|locating) target '[^']*'[,:]?\s*(.*?)\s*(?:full_key: (\S+))?$", text, re.DOTALL
    )
    if found is None:
        return text
    why = re.sub(r"^\w+\((['\"])(.*)\1,?\)$", r"\2", found[1].strip(), flags=re.DOTALL) or "it cannot be made"
    return f"{found[2]}: {why}; python -m search --cfg job shows its settings" if found[2] else why


def _of_system(error: OSError) -> str:
    """Return what the system refused, and what to do about it."""
    advice = next((words for numbers, words in ADVICE.items() if error.errno in numbers), "")
    place = f"{error.filename}: " if error.filename is not None else "the system refuses to go on: "
    return f"{place}{error.strerror or reason(error)}{'; ' if advice else ''}{advice}"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError) and "failed to map segment" in str(error):  # of a library, by the system's loader
        return True
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from supernet.system.memory import is_out_of_memory  # which imports torch

    return is_out_of_memory(error)


def _is_of_hydra(error: BaseException) -> bool:
    """Return whether Hydra's own code raised the exception."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith("hydra.")
