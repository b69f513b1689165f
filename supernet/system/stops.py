"""Ends a command line that is stopped by Ctrl-C or SIGTERM with one line and the usual status, 130 or 143."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM was sent. It is raised wherever the program is, as KeyboardInterrupt is for Ctrl-C."""


@contextmanager
def told_when_stopped(advice: str) -> Iterator[None]:
    """End the process with one line if it is stopped meanwhile; in it `advice` says how things are and how to go on."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _stopped(f"interrupted; {advice}", 130)
    except Terminated:
        _stopped(f"terminated; {advice}", 143)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _stopped(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
