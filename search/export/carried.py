"""Files that lie beside the dense model and belong beside the pruned one: its licence, and what tools read the
tokenizer from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from supernet.models.assemble import FOREIGN

CARRIED = (  # in small letters
    *("license*", "licence*", "notice*", "copying*", "copyright*", "use_policy*", "use-policy*", "acceptable_use*"),
    *(
        "tokenizer.model*",
        "*.tiktoken",
        "tekken.json",
        "spiece.model",
        "sentencepiece*",
        "*.spm",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*"),
)
TEMPLATES = "additional_chat_templates"
CODE = {".py", ".pyc", ".so", ".sh"}  # of strangers: is not ours to pass on


def carry(source: Path | None, folder: Path) -> None:
    """Copy the licence and tokenizer files of the dense model's folder into ours, except those that ours has."""
    for file in _files(source) if source is not None and source.is_dir() else ():
        target = folder / file.name if file.parent == source else folder / TEMPLATES / file.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _files(source: Path) -> Iterator[Path]:
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name.lower(), pattern) for pattern in CARRIED)
        if wanted and file.is_file() and file.suffix.lower() not in CODE:
            yield file
    yield from sorted(file for file in (source / TEMPLATES).glob("*.jinja") if file.is_file())


def drop_foreign_code(folder: Path) -> None:
    """Remove the names of strangers' code from all settings but config.json's, which `assemble` makes anew."""
    for file in sorted(folder.glob("*_config.json")):
        settings = json.loads(file.read_text())
        if isinstance(settings, dict) and settings.keys() & set(FOREIGN):
            left = {name: value for name, value in settings.items() if name not in FOREIGN}
            file.write_text(json.dumps(left, indent=2, ensure_ascii=False) + "\n")
