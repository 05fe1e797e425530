"""Panels of figures: runs of one model, task and recipe, which may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emloc.report.draw.series import ZERO_SHOT
from emloc.report.rows import Row, metric_of

_DATA = ("model", "task", "eval")
_RECIPE = ("lora", "train")


@dataclass(frozen=True)
class Panel:
    """Runs of one panel, all with results."""

    title: str
    metric: str
    rows: tuple[Row, ...]

    def score_label(self, measure: str) -> str:
        """Label of an axis with this number: `score`, the panel's metric, or `gain_kept`."""
        return self.metric if measure == "score" else "share of gain kept"


def panels(rows: Sequence[Row], swept: str = "", dependent: Sequence[str] = ()) -> list[Panel]:
    """Return the runs with results, in panels if a method ran with two models, tasks or recipes.

    The untrained model has no recipe and is in every panel of its model and task.

    Args:
        rows: all runs.
        swept: a setting whose values stand in one panel.
        dependent: settings that follow from the swept one.
    """
    done_runs = [row for row in rows if row.done]
    names = [name for name in _comparable_settings(done_runs) if name not in (swept, *dependent)]
    names = _informative(
        [name for name in names if _differs_within_methods(name, done_runs)], done_runs
    )
    data, recipe = ([n for n in names if _is_in(n, group)] for group in (_DATA, _RECIPE))
    runs_of: dict[tuple[str, ...], list[Row]] = {}
    for row in done_runs:
        if _is_trained(row):
            runs_of.setdefault(_key(row, [*data, *recipe]), []).append(row)
    for row in done_runs:
        if not _is_trained(row):
            same_data = [
                runs for runs in runs_of.values() if _key(runs[0], data) == _key(row, data)
            ]
            for runs in same_data or [runs_of.setdefault(_key(row, data), [])]:
                runs.append(row)
    return [_panel(runs, [*data, *recipe]) for runs in runs_of.values()]


def _informative(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return those of the settings that separate runs which the settings before do not."""
    informative: list[str] = []
    for name in names:
        before, after = (
            len({tuple(row.settings.get(one, "") for one in some) for row in rows})
            for some in (informative, [*informative, name])
        )
        if after > before:
            informative.append(name)
    return informative


def _comparable_settings(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.settings)
    return [name for name in names if "." in name and _is_in(name, (*_DATA, *_RECIPE))]


def _is_in(name: str, sections: Sequence[str]) -> bool:
    return name.partition(".")[0] in sections


def _differs_within_methods(name: str, rows: Sequence[Row]) -> bool:
    """Whether one method, or cell, ran with two values on one model and task."""
    groups = {(row.model, row.task, row.named_method, row.cell) for row in rows}
    values = {
        (row.model, row.task, row.named_method, row.cell, row.settings.get(name)) for row in rows
    }
    return len(values) > len(groups)


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return (row.model, row.task, *(row.settings.get(name, "") for name in names))


def _is_trained(row: Row) -> bool:
    return row.method != ZERO_SHOT


def _panel(rows: Sequence[Row], names: Sequence[str]) -> Panel:
    first = next((row for row in rows if _is_trained(row)), rows[0])
    words = [f"{name.partition('.')[2]}={first.settings.get(name, '')}" for name in names]
    title = ", ".join([f"{first.model} on {first.task}", *words])
    return Panel(title, metric_of(rows), tuple(rows))
