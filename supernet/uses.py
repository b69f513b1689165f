"""Which runs use a supernet: a small file a run below `<supernet>/uses`, so that `python -m supernet gc` knows what may go.

A record names a file of the run that lists the supernet's fingerprint. It counts while that file is there and still does: a run
needs not be told when a supernet goes, nor a supernet when a run's directory is deleted.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import xxhash

from supernet.atomic import write_atomic
from supernet.errors import InputError

USES = "uses"  # in a supernet's folder


@dataclass(frozen=True)
class Use:
    """That a run uses a supernet.

    Attributes:
        referrer: The run's file.
        fingerprint: Of the supernet.
        last_used: When the run opened the supernet last.
    """

    referrer: Path
    fingerprint: str
    last_used: datetime

    @property
    def counts(self) -> bool:
        """Whether the run's file is still there and lists the supernet."""
        try:
            return self.fingerprint.encode() in self.referrer.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # it is there, but not for us to read
            return True


def note_use(folder: Path, fingerprint: str, referrer: Path) -> None:
    """Note that a run's file lists a supernet. Where nothing can be written nothing is: a supernet can be used without that."""
    path = str(referrer.resolve())
    use = {"referrer": path, "fingerprint": fingerprint, "last_used": datetime.now(UTC).isoformat()}
    with suppress(InputError):
        write_atomic(folder / USES / f"{xxhash.xxh3_64_hexdigest(path.encode())}.json", json.dumps(use, indent=1).encode())


def uses_of(folder: Path) -> list[Use]:
    """All that was noted, the latest first."""
    found: list[Use] = []
    for file in (folder / USES).glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged record is none
            use = json.loads(file.read_bytes())
            last_used = datetime.fromisoformat(use["last_used"]).astimezone(UTC)
            found.append(Use(Path(use["referrer"]), str(use["fingerprint"]), last_used))
    return sorted(found, key=lambda use: use.last_used, reverse=True)
