"""Notes which runs use a supernet, so that `python -m supernet gc` knows what may go.

For each run there is a small record below `<supernet>/uses`. It names a file of the run that lists the supernet's
fingerprint, and counts while that file is there and still lists it. So nobody needs to tell a supernet that a run's
directory was deleted.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import xxhash

from supernet.errors import InputError
from supernet.system.records import CHECKSUM, WRONG, UnreadableError, read_json, read_regular, verified, write_record

USES = "uses"  # in a supernet's folder
MOST_OF_A_RECORD, MOST = 1 << 16, 1 << 26  # the most bytes of a record, and of a file that it may refer to
# The years in which a supernet can have been used: others are damage, and cannot be printed in every time zone.
YEARS = (1970, 9000)


@dataclass(frozen=True)
class Use:
    """A record that some run uses a supernet.

    Attributes:
        referrer: A file of the run.
        fingerprint: The supernet's fingerprint, which that file lists.
        last_used: When the run opened the supernet last.
    """

    referrer: Path
    fingerprint: str
    last_used: datetime

    @property
    def counts(self) -> bool:
        """Whether the run's file is still there and lists the supernet, or may do so but cannot be read."""
        try:
            listed = read_regular(self.referrer, MOST)
        except UnreadableError:  # no run wrote that
            return False
        except InputError:  # it is there, but not for us to read
            return True
        return listed is not None and self.fingerprint.encode() in listed


def note_use(folder: Path, fingerprint: str, referrer: Path) -> None:
    """Note that a file of a run lists a supernet. Where nothing can be written there is no note, and no error."""
    path = str(referrer.resolve())
    use = {"referrer": path, "fingerprint": fingerprint, "last_used": datetime.now(UTC).isoformat()}
    with suppress(InputError):
        write_record(folder / USES / f"{xxhash.xxh3_64_hexdigest(path.encode(errors='surrogateescape'))}.json", use)


def uses_of(folder: Path) -> list[Use]:
    """Return all uses that were noted and can be read, the latest first."""
    found = [use for file in _records(folder) if (use := _read(file)) is not None]
    return sorted(found, key=lambda use: use.last_used, reverse=True)


def unreadable_uses(folder: Path) -> list[Path]:
    """Return the records that are damaged: a run may refer to the supernet by one of them, and nobody can tell."""
    return sorted(file for file in _records(folder) if _read(file) is None)


def _records(folder: Path) -> list[Path]:
    """Return the files of records, without links, and without all that is in a folder that is a link."""
    uses = folder / USES
    try:
        if uses.is_symlink():
            return []
        with os.scandir(uses) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False)
            ]
    except OSError:
        return []


def _read(file: Path) -> Use | None:
    """Read a record; None where it is damaged. Records of older supernets have no checksum."""
    try:
        use = read_json(file, MOST_OF_A_RECORD)
        if CHECKSUM in use:
            use = verified(use)
        referrer, fingerprint = use["referrer"], use["fingerprint"]
        last_used = datetime.fromisoformat(use["last_used"]).astimezone(UTC)
        if not (isinstance(referrer, str) and isinstance(fingerprint, str) and fingerprint) or "\0" in referrer:
            return None
        os.fsencode(referrer)  # a name that a file can have
    except (UnreadableError, InputError, *WRONG):
        return None
    return Use(Path(referrer), fingerprint, last_used) if YEARS[0] <= last_used.year <= YEARS[1] else None
