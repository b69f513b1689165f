"""How settings are recorded on disk: by what components are called, not by where their classes lie."""

from __future__ import annotations

from pydoc import ErrorDuringImport, locate
from typing import Any

OWN = ("search", "local_prune", "supernet")  # packages whose files may move


def recorded(settings: Any) -> Any:
    """The same settings with each `_target_` replaced by what does not change when a file of this project is moved.

    That is the class's own name on disk with its version where it has both, as pruners do, and else the last part of
    the path. Classes of other packages keep their whole path: two of them may share a name.
    """
    if isinstance(settings, dict):
        found = {key: recorded(value) for key, value in settings.items()}
        return found | _name_of(settings["_target_"]) if isinstance(settings.get("_target_"), str) else found
    return [recorded(value) for value in settings] if isinstance(settings, list) else settings


def _name_of(target: str) -> dict[str, Any]:
    try:
        found = locate(target)
    except ErrorDuringImport:
        found = None  # told where the component is made
    name, version = getattr(found, "name", None), getattr(found, "version", None)
    if isinstance(name, str) and isinstance(version, int):
        return {"_target_": name, "_version_": version}
    return {"_target_": target.rpartition(".")[2] if target.partition(".")[0] in OWN else target}
