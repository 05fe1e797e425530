"""The runs that an experiment requests, and the runs that there are, as lines and columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from emloc.config.experiments import Experiment, cell_name
from emloc.config.run_folder import DONE
from emloc.report.groups import varying
from emloc.report.rows import Row
from emloc.report.table import EMPTY

# Model and task name a column, and means are over seeds. All other overrides name a line.
_ACROSS = ("model", "task", "seed")
_FACTS = ("cell", "method", *_ACROSS)
# A requested run counts for the first of these states that one of its runs is in.
STATES = (DONE, "failed", "OOM", "interrupted", "running", "not run")
LINE_MODEL, COLUMN, POINT = "line model", "column", "point"  # added by `Grid.placed`


@dataclass(frozen=True)
class Grid:
    """An experiment and all runs of it."""

    experiment: Experiment
    rows: Sequence[Row]

    @cached_property
    def keys(self) -> list[str]:
        """The overrides whose words name a line."""
        swept = dict.fromkeys(key for point in self.experiment.points for key in point)
        return [key for key in swept if key not in _ACROSS] or ["method"]

    @cached_property
    def extra_keys(self) -> list[str]:
        """Further settings in which runs of one model and task differ."""
        # A run without a cell is named by its method.
        names = ["method"] * ("cell" in self.keys and not all(row.cell for row in self.rows))
        for column in dict.fromkeys((row.model, row.task) for row in self.rows):
            rows = [row for row in self.rows if (row.model, row.task) == column]
            for name in varying(rows):
                # A file lacks the settings that all of its runs share. They are no difference.
                names += [name] * (len({row.settings.get(name) for row in rows} - {None}) > 1)
        return [name for name in dict.fromkeys(names) if name not in (*self.keys, *_ACROSS)]

    @cached_property
    def _points(self) -> pd.DataFrame:
        names = (*self.keys, "method", "model", "task")
        return pd.DataFrame(
            {name: self.experiment.word(point, name) for name in names}
            | {"cell": cell_name(point), "seed": point.get("seed", EMPTY)}
            for point in self.experiment.points
        )

    @cached_property
    def requested(self) -> pd.DataFrame:
        """A line for each requested run; its seed is empty where the grid leaves it open."""
        return self.placed(self._points)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A line for each of `rows`, with labels in the words of the grid."""
        names = [*dict.fromkeys([*_FACTS, *self.keys, *self.extra_keys])]
        words = [[row.word(name) for name in names] for row in self.rows]
        runs = pd.DataFrame(words, columns=names, dtype=object)
        for key in self.keys:
            words_of_grid = {_normal(word): word for word in self._points[key]}
            runs[key] = [words_of_grid.get(_normal(word), word) for word in runs[key]]
        return self.placed(runs)

    def placed(self, points: pd.DataFrame) -> pd.DataFrame:
        """The points, with the model of their line, the head of their column, and both as POINT.

        A column is named by its task, and by its model where that is not the model of the line. A
        line has no model where the grid requests several for some line.
        """
        requested = self._points["model"].groupby(tuples(self._points, self.keys))
        has_one = requested.nunique().eq(1).all()
        line_models = dict(requested.first())
        models = {*self._points["model"]}
        lines, heads = [], []
        for *label, model, task in tuples(points, [*self.keys, "model", "task"]):
            own = model if model in models else EMPTY
            lines.append(line_models.get(tuple(label), own) if has_one else EMPTY)
            heads.append(task if lines[-1] == model else f"{model}·{task}")
        points = points.assign(**{LINE_MODEL: lines, COLUMN: heads})
        return points.assign(**{POINT: tuples(points, [*self.keys, LINE_MODEL, COLUMN])})

    def states(self) -> Counter[str]:
        """How many of the requested runs are done, failed, running ... and not run."""
        counts: Counter[str] = Counter()
        for point, seed in zip(self.requested[POINT], self.requested["seed"], strict=True):
            own = {
                row.state.partition("(")[0]
                for run, row in zip(self.runs[POINT], self.rows, strict=True)
                if run == point and seed in (EMPTY, str(row.seed))
            }
            counts[next((state for state in STATES if state in own), STATES[-1])] += 1
        return counts

    def off_grid(self) -> Counter[str]:
        """How many runs with results each model and task has besides the requested runs."""
        requested = {*self.requested[POINT]}
        return Counter(
            f"{row.model} on {row.task}"
            for point, row in zip(self.runs[POINT], self.rows, strict=True)
            if row.done and point not in requested
        )


def tuples(frame: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """The words of each line in these columns, by which lines can be compared and grouped."""
    words = list(frame[list(names)].itertuples(index=False, name=None))
    return pd.Series(words, index=frame.index, dtype=object)


def _normal(word: str) -> str:
    """One word for a number, since a setting that is a float has 1.0 where the grid says 1."""
    try:
        return repr(float(word))
    except ValueError:
        return word
