"""An experiment's grid, and which runs belong to which of its points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from emloc.config.experiments import Experiment, cell_name
from emloc.config.run_folder import DONE
from emloc.report.groups import varying
from emloc.report.rows import Row
from emloc.report.summary import NOT_RUN
from emloc.report.table import EMPTY

# Model and task name a column, and the mean is over seeds. All other overrides name a line.
_ACROSS = ("model", "task", "seed")
# A requested run counts for the first of these that one of its runs is in.
STATES = (DONE, "failed", "OOM", "interrupted", "running", NOT_RUN)
Label = tuple[str, ...]  # the words of a line


@dataclass(frozen=True)
class GridPoint:
    """A line, a model and a task. Its runs differ in the seed, and in settings off the grid."""

    label: Label
    model: str
    task: str


@dataclass(frozen=True)
class Grid:
    """The points of an experiment, and all runs of it."""

    experiment: Experiment
    rows: Sequence[Row]

    @cached_property
    def keys(self) -> list[str]:
        """The overrides whose words name a line of the grid."""
        swept = dict.fromkeys(key for point in self.experiment.points for key in point)
        return [key for key in swept if key not in _ACROSS] or ["method"]

    @cached_property
    def extra_keys(self) -> list[str]:
        """Further settings in which runs of one model and task differ."""
        by_column: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            by_column.setdefault((row.model, row.task), []).append(row)
        # A run without a cell is named by its method. A file of rows has no column for a setting
        # that its runs share, so that a setting without a value is no difference.
        has_strangers = "cell" in self.keys and not all(row.cell for row in self.rows)
        differing = [
            name
            for rows in by_column.values()
            for name in varying(rows)
            if len({row.settings[name] for row in rows if name in row.settings}) > 1
        ]
        names = dict.fromkeys([*["method"] * has_strangers, *differing])
        return [name for name in names if name not in (*self.keys, *_ACROSS)]

    @cached_property
    def requested(self) -> Mapping[GridPoint, set[str]]:
        """Seeds of each grid point; an empty word where the grid leaves the seed open."""
        seeds: dict[GridPoint, set[str]] = {}
        for point in self.experiment.points:
            model, task = (self.experiment.word(point, key) for key in ("model", "task"))
            grid_point = GridPoint(self._label(point), model, task)
            seeds.setdefault(grid_point, set()).add(point.get("seed", EMPTY))
        return seeds

    @cached_property
    def runs(self) -> Mapping[GridPoint, list[Row]]:
        """The runs of each point, also of points off the grid."""
        labels = {tuple(map(_normal, point.label)): point.label for point in self.requested}
        runs: dict[GridPoint, list[Row]] = {}
        for row in self.rows:
            words = tuple(row.word(key) for key in self.keys)
            label = labels.get(tuple(map(_normal, words)), words)
            runs.setdefault(GridPoint(label, row.model, row.task), []).append(row)
        return runs

    @cached_property
    def names(self) -> Mapping[Label, Mapping[str, str]]:
        """Cell and method of every line, by which the paper may name it."""
        names: dict[Label, Mapping[str, str]] = {}
        for point in self.experiment.points:
            method = self.experiment.word(point, "method")
            names.setdefault(self._label(point), {"cell": cell_name(point), "method": method})
        for run_point, rows in self.runs.items():
            names.setdefault(run_point.label, {"cell": rows[0].cell, "method": rows[0].method})
        return names

    @cached_property
    def models(self) -> list[str]:
        """The models of the grid."""
        return list(dict.fromkeys(point.model for point in self.requested))

    @cached_property
    def _models_of(self) -> Mapping[Label, list[str]]:
        models: dict[Label, list[str]] = {}
        for point in dict.fromkeys(self.requested):
            models.setdefault(point.label, []).append(point.model)
        return {label: list(dict.fromkeys(names)) for label, names in models.items()}

    def model_of_line(self, point: GridPoint) -> str:
        """The one model of the point's line; empty where it has several or one off the grid."""
        if any(len(models) > 1 for models in self._models_of.values()):
            return EMPTY
        own = point.model if point.model in self.models else EMPTY
        return self._models_of.get(point.label, [own])[0]

    def states(self) -> Counter[str]:
        """How many of the requested runs are done, failed, running ... and not run."""
        return Counter(
            self._state(point, seed) for point, seeds in self.requested.items() for seed in seeds
        )

    def _state(self, point: GridPoint, seed: str) -> str:
        rows = self.runs.get(point, [])
        states = {r.state.partition("(")[0] for r in rows if seed in (EMPTY, str(r.seed))}
        return next((state for state in STATES if state in states), NOT_RUN)

    def _label(self, point: Mapping[str, str]) -> Label:
        words = {key: self.experiment.word(point, key) for key in self.keys}
        return tuple((words | {"cell": cell_name(point)})[key] for key in self.keys)


def _normal(word: str) -> str:
    """One word for a number, since a setting that is a float has 1.0 where the grid says 1."""
    try:
        return repr(float(word))
    except ValueError:
        return word
