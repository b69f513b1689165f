"""`python -m supernet ls` prints a table of supernets. `size` and `gc` use how it prints sizes and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from supernet.admin.folders import Folder, inspect, supernet_folders

HEADER = ("supernet", "model", "method", "units", "levels", "sparsity", "size", "last used", "runs", "state")
NUMBERS = (3, 4, 5, 6, 8)  # the columns that are aligned to the right
WIDEST = 60  # letters of a label that are printed


def listing(path: Path) -> tuple[str, bool]:
    """Return a table of the supernets, the one that was used last first, and whether none of them is damaged."""
    folders = sorted(map(inspect, supernet_folders(path)), key=lambda folder: folder.last_used, reverse=True)
    return table([HEADER, *map(_row, folders)], NUMBERS), not any(folder.damage for folder in folders)


def _row(folder: Folder) -> tuple[str, ...]:
    units = folder.space.units
    levels = [len(unit.levels) for unit in units]
    sparsities = [round(100 * unit.sparsity(level)) for unit in units for level in range(1, len(unit.levels))]
    return (
        folder.name,
        shortened(folder.label("model")) or "-",
        shortened(folder.label("method")) or "-",
        f"{folder.built}/{len(units) or '?'}",
        spread(levels),
        f"{spread(sparsities)} %" if sparsities else "-",
        readable(folder.bytes),
        f"{folder.last_used.astimezone():%Y-%m-%d %H:%M}",
        str(len(folder.uses)),
        folder.state,
    )


def spread(numbers: Sequence[int]) -> str:
    """Return the smallest and the largest number, such as "3-9"; a single number where all are the same."""
    return "-" if not numbers else "-".join(map(str, sorted({min(numbers), max(numbers)})))


def shortened(label: str) -> str:
    """Cut a label so that it leaves room for the other columns."""
    return label if len(label) <= WIDEST else f"{label[: WIDEST - 3]}..."


def readable(size: int) -> str:
    """Return a number of bytes in the unit that leaves few digits, such as "1.2 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """Set rows under each other in columns; those with these indices are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
