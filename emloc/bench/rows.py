"""The figures of a benchmark as lines of one table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure, beside the peer's where there is one."""

    work: str  # what was run
    what: str  # what was measured
    unit: str
    ours: str
    peer: str = ""
    ratio: str = ""  # peer / ours
    target: str = ""
    holds: str = ""  # yes or no, where there is a target


def row(
    work: str,
    what: str,
    unit: str,
    ours: float,
    *,
    peer: float | None = None,
    most: float | None = None,
    least_ratio: float | None = None,
) -> Row:
    """A row with its target: `ours` at most `most`, or the peer at least `least_ratio` times it."""
    ratio = None if peer is None or not ours else peer / ours
    target, holds = "", ""
    if most is not None:
        target, holds = f"<= {most:g}", _word(ours <= most)
    if least_ratio is not None and ratio is not None:
        target, holds = f"ratio >= {least_ratio:g}", _word(ratio >= least_ratio)
    return Row(work, what, unit, _short(ours), _short(peer), _short(ratio), target, holds)


def _word(holds: bool) -> str:
    return "yes" if holds else "no"


def _short(number: float | None) -> str:
    return "" if number is None or math.isnan(number) else f"{number:.4g}"


def merge(path: Path, new: Sequence[Row]) -> list[Row]:
    """Write the new rows in place of those of the same works, and return all."""
    works = {one.work for one in new}
    rows = [one for one in read(path) if one.work not in works] + list(new)
    rows.sort(key=lambda one: one.work)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in rows)
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no table."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [[field.name for field in fields(Row)], *(list(asdict(one).values()) for one in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in text)


def note(path: Path, work: str, facts: dict[str, object]) -> None:
    """Keep beside the table how the rows of a work came about."""
    home = path.with_suffix(".json")
    known = json.loads(home.read_text()) if home.exists() else {}
    home.write_text(json.dumps(known | {work: facts}, indent=1, sort_keys=True) + "\n")
