"""Progress of long steps: a bar on a terminal, plain log lines with an estimate of the time left elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

Item = TypeVar("Item")
LINES = 10  # a step's plain lines at most, besides the first


def track(items: Sequence[Item], title: str, before: int = 0) -> Iterator[Item]:
    """Yield the items and draw progress under `title`; `before` more items were done in an earlier run."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, dynamic_ncols=True, initial=before, total=before + len(items))
        return
    start = shown = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if done == len(items) or (done % -(-len(items) // LINES) == 0 and now - shown > 1.0):
            shown = now
            left = (now - start) / done * (len(items) - done)
            counts = title, before + done, before + len(items)
            log.info("%s: %d of %d, %s so far, about %s left", *counts, clock(now - start), clock(left))


def clock(seconds: float) -> str:
    """Format seconds as 0:07, 12:34 or 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
