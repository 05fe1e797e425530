"""The figures of a benchmark as lines of one table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from emloc.report.markdown_table import markdown_table

# A number; nan where it could not be taken, and a word where there can be none, such as OOM.
Figure = float | str


@dataclass(frozen=True)
class BenchRow:
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
    ours: Figure,
    *,
    peer: Figure = math.nan,
    most: float | None = None,
    least_ratio: float | None = None,
    near: float | None = None,
) -> BenchRow:
    """A row with its target, if it has one. Without a number to compare a target does not hold.

    `most`: ours is at most this; `least_ratio`: the peer is at least so many times ours; `near`:
    the peer is within this share of ours.
    """
    ratio = _ratio(ours, peer)
    target, met = "", False
    if most is not None:
        target, met = f"<= {most:g}", not isinstance(ours, str) and ours <= most
    elif least_ratio is not None:
        target, met = f"ratio >= {least_ratio:g}", ratio >= least_ratio
    elif near is not None:
        target, met = f"ratio within {near:.0%} of 1", abs(ratio - 1) <= near
    holds = ("yes" if met else "no") if target else ""
    return BenchRow(work, what, unit, _short(ours), _short(peer), _short(ratio), target, holds)


def _ratio(ours: Figure, peer: Figure) -> float:
    if isinstance(ours, str) or isinstance(peer, str) or not ours:
        return math.nan
    return peer / ours


def _short(figure: Figure) -> str:
    if isinstance(figure, str):
        return figure
    return "" if math.isnan(figure) else f"{figure:.4g}"


def merge(path: Path, new: Sequence[BenchRow]) -> list[BenchRow]:
    """Write the new rows in place of those of the same works, and return all."""
    works = {one.work for one in new}
    rows = [one for one in read(path) if one.work not in works] + list(new)
    rows.sort(key=lambda one: one.work)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [field.name for field in fields(BenchRow)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(asdict(one) for one in rows)
    return rows


def read(path: Path) -> list[BenchRow]:
    """The rows of a table; none where there is no table."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [BenchRow(**line) for line in csv.DictReader(file)]


def table(rows: Iterable[BenchRow]) -> str:
    """The rows in Markdown."""
    header = [field.name for field in fields(BenchRow)]
    return markdown_table(header, [list(asdict(one).values()) for one in rows])


def note(path: Path, work: str, facts: dict[str, object]) -> None:
    """Keep beside the table how the rows of a work came about."""
    home = path.with_suffix(".json")
    known = json.loads(home.read_text()) if home.exists() else {}
    home.write_text(json.dumps(known | {work: facts}, indent=1, sort_keys=True) + "\n")
