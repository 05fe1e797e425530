"""An experiment as a paper prints it: a line for each label of its grid, a column for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from emloc.report.grid import Grid, GridPoint, Label
from emloc.report.groups import group_numbers
from emloc.report.notes import left_out
from emloc.report.paper import Paper, Quantity
from emloc.report.rows import Row
from emloc.report.table import EMPTY, Table, best

HOW_TO_READ = (
    "mean ± standard deviation over seeds, [2/3] where seeds are missing, then the paper's number "
    "in brackets; scores in percent, the best of ours in bold; empty: no result"
)


def task_table(grid: Grid, paper: Paper, quantity: Quantity) -> tuple[Table, list[str]]:
    """Our number at each grid point, then the paper's in brackets; the best of ours stands out.

    A column is named by its task, and by its model where that is not the model of the line.
    `[2/3]` counts the seeds that are done and those that the grid requests. A line without any
    result is left out, unless the paper has a number for it or it was not run at all.

    Args:
        grid: an experiment and its runs.
        paper: the paper's numbers of the experiment.
        quantity: what to show.

    Returns:
        The table, and a note on the runs of lines without a result.

    Raises:
        ConfigError: the paper has two numbers for one grid point.
    """
    numbers = [one for one in paper.numbers if one.quantity == quantity.name]
    view = _View(grid, Paper(numbers), quantity)
    lines = [words for line in view.lines if (words := view.words(line))]
    frame = pd.DataFrame(lines, columns=view.heads)
    scores = [one.head for one in view.columns] if quantity.name == "score" else []
    failures = [row for line in view.lines if not view.has_result(line) for row in view.rows(line)]
    table = Table(frame, best(frame, [EMPTY] * len(frame), dict.fromkeys(scores, True)))
    return table, left_out(failures)


@dataclass(frozen=True)
class _Column:
    model: str  # empty: the model of the line
    task: str

    @property
    def head(self) -> str:
        return f"{self.model}·{self.task}" if self.model else self.task


@dataclass(frozen=True)
class _Line:
    label: Label
    model: str  # empty: each column names its own
    extra: Label  # the words of the extra settings


@dataclass(frozen=True)
class _View:
    """Lines and columns of one table."""

    grid: Grid
    paper: Paper
    quantity: Quantity

    @cached_property
    def absent(self) -> dict[GridPoint, dict[str, str]]:
        """The points of which only the paper has numbers, and the facts that it names of them."""
        absent: dict[GridPoint, dict[str, str]] = {}
        known = [self._facts(point) for point in (*self.grid.requested, *self.grid.runs)]
        for number in self.paper.numbers:
            if any(map(number.about, known)):
                continue
            keys = dict(number.keys)
            named = {"cell": keys.get("method", EMPTY)} | keys
            label = tuple(named.get(key, EMPTY) for key in self.grid.keys)
            tasks = [point.task for point in self.grid.requested if point.model == keys["model"]]
            for task in [keys["task"]] if "task" in keys else tasks or [EMPTY]:
                absent.setdefault(GridPoint(label, keys["model"], task), {}).update(keys)
        return absent

    @cached_property
    def points(self) -> list[GridPoint]:
        """The grid's points, then those of the paper alone, then those of other runs."""
        return list(dict.fromkeys((*self.grid.requested, *self.absent, *self.grid.runs)))

    @cached_property
    def columns(self) -> list[_Column]:
        return list(dict.fromkeys(self._column(point) for point in self.points))

    @cached_property
    def lines(self) -> list[_Line]:
        extras: dict[tuple[Label, str], dict[Label, None]] = {}
        for point in self.points:
            words = extras.setdefault((point.label, self.grid.model_of_line(point)), {})
            words.update(dict.fromkeys(map(self._extra, self.grid.runs.get(point, []))))
        bare = (EMPTY,) * len(self.grid.extra_keys)
        return [_Line(*line, extra) for line, words in extras.items() for extra in words or [bare]]

    @cached_property
    def heads(self) -> list[str]:
        """The heads of all columns: labels first."""
        keys = self.grid.keys
        is_model_of_line = len(self.grid.models) > 1 and any(line.model for line in self.lines)
        labels = [*keys, *["model"] * is_model_of_line, *self.grid.extra_keys]
        return [*labels, *(column.head for column in self.columns)]

    def rows(self, line: _Line) -> list[Row]:
        """All runs of a line."""
        return [row for column in self.columns for row in self._runs(line, column)]

    def has_result(self, line: _Line) -> bool:
        return any(row.done for row in self.rows(line))

    def words(self, line: _Line) -> dict[str, str]:
        """Column -> word; empty if the line is left out."""
        cells = {column.head: self._cell(line, column) for column in self.columns}
        if self.rows(line) and not any(cells.values()):
            return {}
        words = dict(zip(self.grid.keys, line.label, strict=True)) | {"model": line.model}
        return words | dict(zip(self.grid.extra_keys, line.extra, strict=True)) | cells

    def _cell(self, line: _Line, column: _Column) -> str:
        point, rows = self._point(line, column), self._runs(line, column)
        # The grid does not say how many seeds it requests of each of the extra settings.
        is_all = len(rows) == len(self.grid.runs.get(point, []))
        seeds = len(self.grid.requested.get(point, ())) if is_all else 0
        groups: dict[int, list[Row]] = {}
        for row, group in zip(rows, group_numbers(rows), strict=True):
            groups.setdefault(group, []).append(row)
        ordered = sorted(groups.values(), key=lambda group: not group[0].done)
        words = dict.fromkeys(self._word(group, seeds) for group in ordered)
        ours = "; ".join(words) if self.has_result(line) else EMPTY
        number = self.paper.find(self.quantity.name, self._facts(point))
        if number is None or (self.quantity.name == "score" and not all(r.headline for r in rows)):
            return ours
        return f"{ours} ({number.word})".lstrip()

    def _word(self, group: Sequence[Row], seeds: int) -> str:
        if not group[0].done:
            return group[0].state
        word = self.quantity.word(group)
        return f"{word} [{len(group)}/{seeds}]" if word and len(group) < seeds else word

    def _facts(self, point: GridPoint) -> Mapping[str, str]:
        """The facts by which the paper may name a point."""
        names = self.grid.names.get(point.label)
        names = self.absent.get(point, {}) if names is None else names
        column = {"model": point.model, "task": point.task}
        return {"experiment": self.grid.experiment.name, **names, **column}

    def _column(self, point: GridPoint) -> _Column:
        is_of_line = self.grid.model_of_line(point) == point.model
        return _Column(EMPTY if is_of_line else point.model, point.task)

    def _point(self, line: _Line, column: _Column) -> GridPoint:
        return GridPoint(line.label, column.model or line.model, column.task)

    def _runs(self, line: _Line, column: _Column) -> list[Row]:
        rows = self.grid.runs.get(self._point(line, column), [])
        return [row for row in rows if self._extra(row) == line.extra]

    def _extra(self, row: Row) -> Label:
        return tuple(row.word(name) for name in self.grid.extra_keys)
