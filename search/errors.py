"""What other libraries report, put so that it fits into our one-line messages."""

import difflib
from collections.abc import Iterable

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

from supernet.errors import InputError

# Settings that only other choices have.
ELSEWHERE = {
    "prune.fit": "is only for the methods that fit weights: prune=obs, sparsegpt, apt or gptq",
    "prune.accumulation": "is only for methods that look at activations; this one does not",
    "prune.multiple": "is only for structured methods: prune=obs, magnitude_sp, wanda_sp, flap, taylor, amp or bonsai",
    "prune.query_heads": "is only for structured methods: prune=obs, magnitude_sp, wanda_sp, flap, taylor, amp or bonsai",
    "prune.batch": "is only for methods that look at text; this one does not",
}


def reason(error: Exception) -> str:
    """The first line of what an exception says, or the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like a misspelt one, or all of them where none is like it."""
    names = sorted(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names)


def one_line(error: BaseException) -> str:
    """What an exception and its causes come to, on one line: the first InputError, or what Hydra means in a user's words."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    users: list[BaseException] = [link for link in chain if isinstance(link, InputError)]
    told = [str(users[0])] if users else [text for link in chain if (text := _translated(link))]
    return " ".join((told or [str(error) or type(error).__name__])[0].split())


def _translated(error: BaseException) -> str:
    """What a user can do about an exception of Hydra or OmegaConf; nothing where a later link of the chain knows more."""
    match error:
        case MissingMandatoryValue(full_key=str(key)):
            return f"{key} is not given; add {key}=VALUE to the command"
        case ConfigKeyError() | ConfigAttributeError() if error.full_key in ELSEWHERE:
            return f"{error.full_key} {ELSEWHERE[str(error.full_key)]}"
        case ConfigKeyError() | ConfigAttributeError() if isinstance(error.parent_node, DictConfig):
            group = str(error.full_key).removesuffix(str(error.key))
            known = [f"{group}{key!s}" for key in error.parent_node]
            return f"there is no setting {error.full_key}; did you mean {nearest(str(error.full_key), known)}?"
        case OverrideParseException():
            return f"'{error.override}' cannot be read; write key=value, and quote values with special characters"
        case InstantiationException():
            return str(error)
        case HydraException() if error.__cause__ is None and error.__context__ is None:
            return str(error)
        case _:
            return ""
