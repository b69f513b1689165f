"""The command line: `python -m search +experiment=demo`.

Exit status 0; 1 with one line that says what was wrong; 130 and 143 where it was stopped, with one line that says how to go on.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM, raised where the work stands, as Ctrl-C is."""


def main() -> None:
    """Run the command line in `sys.argv`."""
    with _stops():
        from search.command import command  # takes seconds, in which one may want to stop it, too

        command()


@contextmanager
def _stops() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _stopped("interrupted", 130)
    except Terminated:
        _stopped("terminated", 143)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _stopped(word: str, status: int) -> NoReturn:
    print(f"{word}; the same command continues from the last completed step", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
