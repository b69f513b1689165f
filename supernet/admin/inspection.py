"""`python -m supernet verify` checks every byte against its checksum; `size` tells what each unit and level takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from supernet.admin.folders import Folder, inspect, plain, supernet_folders
from supernet.admin.listing import readable, table
from supernet.candidates import count
from supernet.errors import InputError
from supernet.manifest import FORMAT, damaged
from supernet.space import BITS, WEIGHTS, Unit
from supernet.store import Supernet
from supernet.unit_file import UnitFile

# Columns of the table besides the levels: the tensors that all levels share, and the header that describes tensors.
SHARED, HEADER = -1, -2
# Bytes of a weight in a dense file for each level, which is how EvoPress and others keep candidates.
DENSE_BYTES = 2


def verify(path: Path) -> Iterator[tuple[str, bool]]:
    """Check all supernets of a folder; yield a line for each, and whether it is as it was written."""
    for folder in map(inspect, supernet_folders(path)):
        if folder.format != FORMAT:
            yield f"{folder.name}: not checked, it is of format {folder.format} and this version reads {FORMAT}", True
            continue
        problems = [folder.damage] if folder.damage else []
        if folder.manifest:
            problems = _problems(Supernet(folder.path, folder.manifest))
        more = f" (and {len(problems) - 1} more units are damaged)" if len(problems) > 1 else ""
        units = f"{folder.built} of {len(folder.space.units)} units" if folder.manifest else "nothing is built yet"
        line = f"damaged: {plain(problems[0])}{more}" if problems else f"ok, {units}, {readable(folder.bytes)}"
        yield f"{folder.name}: {line}", not problems


def _problems(supernet: Supernet) -> list[str]:
    """Return what is wrong with each unit that is damaged."""
    found = []
    for index, unit in enumerate(supernet.space.units):
        try:
            if supernet.has(unit.name):
                _check(supernet, index)
        except InputError as error:
            found.append(str(error))
        supernet.release()
    return found


def _check(supernet: Supernet, index: int) -> None:
    """Raise InputError if a tensor of a unit is not as it was written, or a level does not keep what the unit says."""
    unit = supernet.space.units[index]
    file = supernet.unit_file(unit.name)
    for name in file.names:
        file.tensor(name)
    for level in range(1, len(unit.levels)):
        kept = count(supernet.candidate(index, level))
        if kept != unit.levels[level].kept:
            raise damaged(file.path, f"level {level} keeps {kept} and not {unit.levels[level].kept}")


def sizes(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield a table of sizes for each supernet of a folder, and whether it could be read.

    The table shows bytes by unit and level, and totals by kind of unit and altogether.
    """
    for folder in map(inspect, supernet_folders(path)):
        try:
            told, well = (folder.damage, False) if folder.damage else (_sizes(folder), True)
        except InputError as error:
            told, well = plain(str(error)), False
        yield f"{folder.name}: {told}", well


def _sizes(folder: Folder) -> str:
    if folder.format != FORMAT:
        return f"{readable(folder.bytes)} of format {folder.format}, which this version does not read"
    if not folder.manifest or not folder.built:
        return "nothing is built yet"
    supernet = Supernet(folder.path, folder.manifest)
    built = [unit for unit in folder.space.units if supernet.has(unit.name)]
    by_unit = {unit: _bytes_by_column(supernet.unit_file(unit.name)) for unit in built}
    by_kind: dict[str, int] = defaultdict(int)
    for unit, found in by_unit.items():
        by_kind[unit.kind] += sum(found.values())
    kinds, total = ", ".join(f"{kind} {readable(size)}" for kind, size in by_kind.items()), sum(by_kind.values())
    return f"{readable(total)} ({kinds}){_compared(total, built)}\n{_size_table(by_unit)}"


def _size_table(by_unit: Mapping[Unit, Mapping[int, int]]) -> str:
    levels = range(1, max(len(unit.levels) for unit in by_unit))
    titles = {level: f"level {level}" for level in levels} | {SHARED: "shared", HEADER: "header"}
    columns = [column for column in titles if any(column in found for found in by_unit.values())]
    rows = [["unit", "kind", *(titles[column] for column in columns), "all"]]
    for unit, found in by_unit.items():
        cells = [readable(found[column]) if column in found else "-" for column in columns]
        rows.append([unit.name, unit.kind, *cells, readable(sum(found.values()))])
    return table(rows, range(2, len(rows[0])))


def _bytes_by_column(file: UnitFile) -> dict[int, int]:
    """Return the bytes of each level of a unit, of what its levels share, and of the header."""
    found = {HEADER: file.header_bytes}
    for tensor, size in file.sizes.items():
        level, dot, _ = tensor.partition(".")
        column = int(level) if dot and level.isdecimal() else SHARED
        found[column] = found.get(column, 0) + size
    return found


def _compared(total: int, units: Sequence[Unit]) -> str:
    """Return a few words that compare a supernet of linear layers with dense files of all its levels.

    They are empty for heads and neurons, for which the space does not say how large the layers are.
    """
    if not {unit.kind for unit in units} <= {WEIGHTS, BITS}:
        return ""
    weights = [unit.total if unit.kind == WEIGHTS else unit.levels[0].cost // unit.total for unit in units]
    dense = sum(DENSE_BYTES * number * (len(unit.levels) - 1) for number, unit in zip(weights, units, strict=True))
    if not dense:
        return ""
    return (
        f", {total / dense:.1%} of what dense files of {DENSE_BYTES} bytes a weight take for these levels "
        f"({readable(dense)})"
    )
