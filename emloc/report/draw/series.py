"""Lines and points of figures: runs that differ in one setting, runs that differ in the seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emloc.config.settings import PARTS
from emloc.report.draw.labels import format_name, line_labels
from emloc.report.rows import Row

Measure = Callable[[Row], float | None]

ZERO_SHOT = "zero_shot"
REFERENCES = (ZERO_SHOT, "lora")  # lower and upper end of what other methods are compared to
RATIO = "compression.ratio"

_UNCOMPRESSED = ("full", "offload")  # emulators that ignore ratio and calibration
_LABELLING = ("calibration", "precision", *PARTS)  # groups that label lines


@dataclass(frozen=True)
class Value:
    """Mean and standard deviation over seeds. The deviation of a single seed is 0."""

    mean: float
    spread: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Value:
        """Return mean and deviation of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.mean(values), deviation)


@dataclass(frozen=True)
class Point:
    """Runs that differ only in the seed, one run for each seed."""

    rows: tuple[Row, ...]

    def value(self, measure: Measure) -> Value | None:
        """Return mean and deviation; None if any of the runs lacks the value."""
        values = [value for row in self.rows if (value := measure(row)) is not None]
        return Value.over(values) if len(values) == len(self.rows) else None


@dataclass(frozen=True)
class Series:
    """Points that differ only in one setting: its value -> point."""

    label: str
    method: str
    packed: str  # format of the weights trained through; empty for the model's dtype
    points: Mapping[str, Point]

    @property
    def is_anchored(self) -> bool:
        """Whether its runs were trained with anchors."""
        return self.rows[0].is_anchored

    @property
    def rows(self) -> list[Row]:
        """All runs of the line."""
        return [row for point in self.points.values() for row in point.rows]


def number(name: str) -> Measure:
    """Return a measure that reads one of a row's numbers."""
    return lambda row: row.number(name)


def is_uncompressed(row: Row) -> bool:
    """Whether the run trains through the original model, so that a ratio means nothing."""
    return row.named_method in REFERENCES or row.settings.get("emulator") in _UNCOMPRESSED


def series(rows: Iterable[Row], swept: str = "", dependent: Sequence[str] = ()) -> list[Series]:
    """Return the runs with results as lines, in the order of their first run.

    Args:
        rows: of one panel.
        swept: the setting in which the points of a line differ. Without, a line is one point.
        dependent: settings that follow from the swept one.
    """
    swept_names = (swept, *dependent)
    lines: dict[object, list[Row]] = {}
    for row in rows:
        if row.done:
            key = row.named_method, frozenset(_line_settings(row, swept_names).items())
            lines.setdefault(key, []).append(row)
    settings = [_line_settings(runs[0], swept_names) for runs in lines.values()]
    labels = line_labels(list(lines.values()), settings, swept)
    return [
        Series(label, runs[0].named_method, format_name(runs[0].settings), _points(runs, swept))
        for runs, label in zip(lines.values(), labels, strict=True)
    ]


def _points(rows: Sequence[Row], swept: str) -> dict[str, Point]:
    values: dict[str, dict[int, Row]] = {}
    for row in rows:
        # A method that ignores a setting may have run with each of its values and the same seed.
        values.setdefault(row.settings.get(swept, ""), {}).setdefault(row.seed, row)
    return {value: Point(tuple(runs.values())) for value, runs in values.items()}


def _line_settings(row: Row, swept: Sequence[str]) -> dict[str, str]:
    """Return the settings that decide which line of its method a run belongs to."""
    return {
        name: value
        for name, value in row.decisive.items()
        if name not in swept and _separates_lines(name, row, swept)
    }


def _separates_lines(name: str, row: Row, swept: Sequence[str]) -> bool:
    section, _, leaf = name.partition(".")
    if is_uncompressed(row) and name == RATIO:
        return False
    uses_covariance = row.settings.get("recovery.metric") == "covariance"
    if is_uncompressed(row) and section == "calibration" and not uses_covariance:
        return False
    if row.method == ZERO_SHOT and section in ("lora", "train"):
        return False
    # The choice of a swept setting's group is only a name for the swept value.
    swept_sections = [other.partition(".")[0] for other in swept]
    return bool(leaf) or (section in _LABELLING and section not in swept_sections)
