"""The command line: `python -m supernet ls|verify|size|gc PATH`. Exit status 0, or 1 where something is wrong."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from supernet.errors import InputError
from supernet.system.stops import told_when_stopped


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see python -m supernet --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default the one in `sys.argv`; SystemExit with status 1 where something is wrong."""
    with told_when_stopped("nothing is half done; give the same command again"):
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    try:
        given = _parser().parse_args(arguments)
        if not given.command(given):
            sys.exit(1)
    except (InputError, OSError) as error:
        from supernet.admin.folders import plain

        print(f"error: {plain(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m supernet", description="Look after the supernets that runs leave on disk.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    helps: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {
        "ls": (_ls, "what is there, the supernet that was used last first"),
        "verify": (_verify, "check every byte against its checksum, and decode every level"),
        "size": (_size, "bytes by unit and level"),
        "gc": (_gc, "remove what no run refers to, and what killed processes left"),
    }
    for name, (command, what) in helps.items():
        added = commands.add_parser(name, help=what, description=what)
        added.add_argument("path", metavar="PATH", type=Path, help="a supernet, or a folder of supernets")
        added.set_defaults(command=command)
        if command is _gc:
            added.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


# What a command needs is imported when it runs: to import torch takes seconds, and `ls` can do without.


def _ls(given: argparse.Namespace) -> bool:
    from supernet.admin.listing import listing

    lines, well = listing(given.path.resolve())
    print(lines)
    return well


def _verify(given: argparse.Namespace) -> bool:
    from supernet.admin.inspection import verify

    return _told(verify(given.path.resolve()))


def _size(given: argparse.Namespace) -> bool:
    from supernet.admin.inspection import sizes

    return _told(sizes(given.path.resolve()), between="\n")


def _gc(given: argparse.Namespace) -> bool:
    from supernet.admin.removal import collect

    return _told(collect(given.path.resolve(), given.dry_run))


def _told(lines: Iterable[tuple[str, bool]], between: str = "") -> bool:
    """Print each supernet's lines as soon as they are known, and return whether all supernets are well."""
    all_well, before = True, ""
    for line, well in lines:
        print(f"{before}{line}", flush=True)
        all_well, before = all_well and well, between
    return all_well


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no umlauts must not end in a traceback
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other tools: `... | head` ends it without a word
    main()
