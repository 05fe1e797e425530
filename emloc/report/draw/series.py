"""Which runs are one point of a figure, and which points one line."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emloc.report.draw.labels import called, format_name
from emloc.report.rows import Row

Measure = Callable[[Row], float | None]

ZERO_SHOT = "zero_shot"
REFERENCES = (ZERO_SHOT, "lora")  # what everything else lies between
RATIO = "compression.ratio"

_WHOLE = ("full", "offload")  # emulators that no ratio and no calibration changes
# Told by the choice of their group.
_PARTS = ("calibration", "precision", "emulator", "adapter", "recovery")


@dataclass(frozen=True)
class Value:
    """Mean and standard deviation over seeds, which is 0 of a single one."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but the seed, one of each seed."""

    rows: tuple[Row, ...]

    def value(self, measure: Measure) -> Value | None:
        """None where it is not known of all of them."""
        known = [value for row in self.rows if (value := measure(row)) is not None]
        if len(known) < len(self.rows):
            return None
        return Value(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0)


@dataclass(frozen=True)
class Series:
    """Points that differ in one setting alone: its value -> point."""

    label: str
    method: str
    packed: str  # the format trained through; empty for the model's dtype
    points: Mapping[str, Point]

    @property
    def rows(self) -> list[Row]:
        """All runs of it."""
        return [row for point in self.points.values() for row in point.rows]


def number(name: str) -> Measure:
    """One of a row's numbers."""
    return lambda row: row.number(name)


def is_whole(row: Row) -> bool:
    """Whether the model was trained through as it is, so that a ratio says nothing."""
    return row.method in REFERENCES or row.settings.get("emulator") in _WHOLE


def series(rows: Iterable[Row], swept: str = "", alike: Sequence[str] = ()) -> list[Series]:
    """The runs with results as lines, in the order of their first.

    Args:
        rows: of one panel.
        swept: the setting in which the points of a line differ; without, a line is one point.
        alike: settings that follow from it.
    """
    lines: dict[object, list[Row]] = {}
    for row in rows:
        if row.done:
            told = _told(row, (swept, *alike))
            lines.setdefault((row.method, frozenset(told.items())), []).append(row)
    labels = called(list(lines.values()), lambda row: _told(row, (swept, *alike)), swept)
    return [
        Series(label, runs[0].method, format_name(runs[0].settings), _points(runs, swept))
        for runs, label in zip(lines.values(), labels, strict=True)
    ]


def _points(rows: Sequence[Row], swept: str) -> dict[str, Point]:
    values: dict[str, dict[int, Row]] = {}
    for row in rows:
        # What ignores a setting may have run once for each of its values, with the same seed.
        values.setdefault(row.settings.get(swept, ""), {}).setdefault(row.seed, row)
    return {value: Point(tuple(runs.values())) for value, runs in values.items()}


def _told(row: Row, skipped: Sequence[str]) -> dict[str, str]:
    """The settings by which a row is of one line and not of another of its method."""
    return {
        name: value
        for name, value in row.decisive.items()
        if name not in skipped and _tells(name, row, skipped)
    }


def _tells(name: str, row: Row, skipped: Sequence[str]) -> bool:
    section, _, leaf = name.partition(".")
    if is_whole(row) and name == RATIO:
        return False
    weighted = row.settings.get("recovery.metric") == "covariance"
    if is_whole(row) and section == "calibration" and not weighted:
        return False
    if row.method == ZERO_SHOT and section in ("lora", "train"):
        return False
    # The choice of a swept setting's group is no more than a name for its value.
    return bool(leaf) or (
        section in _PARTS and section not in [s.partition(".")[0] for s in skipped]
    )
