"""Rows that may be compared: of one model, task and recipe, and so of one panel of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emloc.report.draw.series import ZERO_SHOT
from emloc.report.rows import Row, metric_of

_DATA = ("model", "task", "eval")
_TRAINING = ("lora", "train")


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    title: str
    metric: str
    rows: tuple[Row, ...]  # with results


def panels(rows: Sequence[Row], swept: str = "", alike: Sequence[str] = ()) -> list[Panel]:
    """The rows with results, taken apart where a method ran with two models, tasks or recipes.

    What was never trained has no recipe, and is in every panel of its model and task.

    Args:
        rows: all.
        swept: a setting whose values stand in one panel.
        alike: settings that follow from it.
    """
    done = [row for row in rows if row.done]
    names = [name for name in _settings(done) if name not in (swept, *alike)]
    apart = [name for name in names if _differs_within(name, done)]
    apart = telling(apart, done)
    data, recipe = ([name for name in apart if _in(name, group)] for group in (_DATA, _TRAINING))
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in done:
        if _trains(row):
            found.setdefault(_place(row, [*data, *recipe]), []).append(row)
    untouched = [row for row in done if not _trains(row)]
    for row in untouched:
        places = [runs for runs in found.values() if _place(runs[0], data) == _place(row, data)]
        for runs in places or [found.setdefault(_place(row, data), [])]:
            runs.append(row)
    return [_panel(runs, [*data, *recipe]) for runs in found.values()]


def telling(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Those of the settings that tell rows apart which the ones before them do not."""
    kept: list[str] = []
    for name in names:
        before, after = (
            len({tuple(row.settings.get(one, "") for one in some) for row in rows})
            for some in (kept, [*kept, name])
        )
        if after > before:
            kept.append(name)
    return kept


def _settings(rows: Sequence[Row]) -> list[str]:
    every = dict.fromkeys(name for row in rows for name in row.settings)
    return [name for name in every if "." in name and _in(name, (*_DATA, *_TRAINING))]


def _in(name: str, sections: Sequence[str]) -> bool:
    return name.partition(".")[0] in sections


def _differs_within(name: str, rows: Sequence[Row]) -> bool:
    """Whether one method, or cell, ran with two values on one model and task."""
    peers = {(row.model, row.task, row.method, row.cell) for row in rows}
    values = {(row.model, row.task, row.method, row.cell, row.settings.get(name)) for row in rows}
    return len(values) > len(peers)


def _place(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return (row.model, row.task, *(row.settings.get(name, "") for name in names))


def _trains(row: Row) -> bool:
    return row.method != ZERO_SHOT


def _panel(rows: Sequence[Row], apart: Sequence[str]) -> Panel:
    first = next((row for row in rows if _trains(row)), rows[0])
    words = [f"{name.partition('.')[2]}={first.settings.get(name, '')}" for name in apart]
    title = ", ".join([f"{first.model} on {first.task}", *words])
    return Panel(title, metric_of(rows), tuple(rows))
