"""Rows of the table of benchmarks, which is kept as a CSV file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from emloc.report.markdown_table import markdown_table

# A number, nan if it was not measured, or a word for why there is no number, such as OOM.
Figure = float | str


@dataclass(frozen=True)
class BenchRow:
    """One figure of a benchmark, with the figure of a peer and a target if there are any."""

    work: str  # name of the benchmark
    what: str  # measured quantity
    unit: str
    ours: str  # figure of this package
    peer: str = ""  # figure of another library or method
    ratio: str = ""  # peer / ours
    target: str = ""
    holds: str = ""  # whether the target holds: yes or no; empty without a target


def row(
    benchmark: str,
    what: str,
    unit: str,
    ours: Figure,
    *,
    peer: Figure = math.nan,
    most: float | None = None,
    least_ratio: float | None = None,
    near: float | None = None,
) -> BenchRow:
    """Return a row, with at most one target. A target without numbers to compare does not hold.

    Args:
        benchmark: name of the benchmark.
        what: measured quantity.
        unit: unit of both figures.
        ours: figure of this package.
        peer: figure of another library or method.
        most: target for the largest value of `ours`.
        least_ratio: target for the smallest value of `peer / ours`.
        near: target for the largest distance of `peer / ours` from 1.
    """
    ratio = _ratio(ours, peer)
    target, is_met = "", False
    if most is not None:
        target, is_met = f"<= {most:g}", not isinstance(ours, str) and ours <= most
    elif least_ratio is not None:
        target, is_met = f"ratio >= {least_ratio:g}", ratio >= least_ratio
    elif near is not None:
        target, is_met = f"ratio within {near:.0%} of 1", abs(ratio - 1) <= near
    holds = ("yes" if is_met else "no") if target else ""
    return BenchRow(
        benchmark, what, unit, _format(ours), _format(peer), _format(ratio), target, holds
    )


def _ratio(ours: Figure, peer: Figure) -> float:
    """Return `peer / ours`; nan if one of them is a word or `ours` is 0."""
    if isinstance(ours, str) or isinstance(peer, str) or not ours:
        return math.nan
    return peer / ours


def _format(figure: Figure) -> str:
    """Format a figure with four digits; nan becomes empty."""
    if isinstance(figure, str):
        return figure
    return "" if math.isnan(figure) else f"{figure:.4g}"


def replace_rows(path: Path, new: Sequence[BenchRow]) -> list[BenchRow]:
    """Replace the rows of the same benchmarks in the table, and return all rows."""
    benchmarks = {row.work for row in new}
    rows = [row for row in read_rows(path) if row.work not in benchmarks] + list(new)
    rows.sort(key=lambda row: row.work)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [field.name for field in fields(BenchRow)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return rows


def read_rows(path: Path) -> list[BenchRow]:
    """Return the rows of a table; empty if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [BenchRow(**line) for line in csv.DictReader(file)]


def table(rows: Iterable[BenchRow]) -> str:
    """Return the rows as a table in Markdown."""
    header = [field.name for field in fields(BenchRow)]
    return markdown_table(header, [list(asdict(row).values()) for row in rows])


def write_facts(path: Path, benchmark: str, facts: dict[str, object]) -> None:
    """Write facts about a benchmark, such as its device, to a JSON file next to the table."""
    facts_path = path.with_suffix(".json")
    all_facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
    all_facts |= {benchmark: facts}
    facts_path.write_text(json.dumps(all_facts, indent=1, sort_keys=True) + "\n")
