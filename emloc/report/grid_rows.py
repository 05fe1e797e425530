"""Which runs are which points of an experiment's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from emloc.config.experiments import Experiment, cell_name
from emloc.report.groups import varying
from emloc.report.rows import Row
from emloc.report.table import EMPTY

# What a column is of, and what a mean is over: all else tells lines apart.
_ACROSS = ("model", "task", "seed")
Line = tuple[str, ...]  # the words that it is told by


@dataclass(frozen=True)
class Spot:
    """A line, a model and a task: what runs that differ in the seed alone are of."""

    line: Line
    model: str
    task: str


@dataclass(frozen=True)
class Placed:
    """An experiment's grid and the runs in it."""

    experiment: Experiment
    rows: Sequence[Row]

    @cached_property
    def keys(self) -> list[str]:
        """The overrides whose words tell the lines of the grid apart."""
        swept = dict.fromkeys(key for point in self.experiment.points for key in point)
        return [key for key in swept if key not in _ACROSS] or ["method"]

    @cached_property
    def more(self) -> list[str]:
        """Further settings, in which runs of one model and task differ."""
        places = dict.fromkeys((row.model, row.task) for row in self.rows)
        of_each = [[r for r in self.rows if (r.model, r.task) == place] for place in places]
        # A run that is of no cell is told by its method, and by what else it was given.
        strange = "cell" in self.keys and not all(row.cell for row in self.rows)
        # A file has no column for what all of its runs share: what is not known is no difference.
        differ = [name for rows in of_each for name in varying(rows) if len(_known(name, rows)) > 1]
        names = dict.fromkeys([*["method"] * strange, *differ])
        return [name for name in names if name not in (*self.keys, *_ACROSS)]

    @cached_property
    def asked(self) -> Mapping[Spot, set[str]]:
        """Seeds that the grid asks for; an empty word where it leaves the seed open."""
        seeds: dict[Spot, set[str]] = {}
        for point in self.experiment.points:
            model, task = (self.experiment.word(point, key) for key in ("model", "task"))
            seeds.setdefault(Spot(self._line(point), model, task), set()).add(point.get("seed", ""))
        return seeds

    @cached_property
    def found(self) -> Mapping[Spot, list[Row]]:
        """The runs there are."""
        grid = {tuple(map(_plain, spot.line)): spot.line for spot in self.asked}
        rows: dict[Spot, list[Row]] = {}
        for row in self.rows:
            words = tuple(word_of(row, key) for key in self.keys)
            line = grid.get(tuple(map(_plain, words)), words)
            rows.setdefault(Spot(line, row.model, row.task), []).append(row)
        return rows

    @cached_property
    def told(self) -> Mapping[Line, Mapping[str, str]]:
        """Cell and method of every line, as the paper may name it."""
        told: dict[Line, Mapping[str, str]] = {}
        for point in self.experiment.points:
            method = self.experiment.word(point, "method")
            told.setdefault(self._line(point), {"cell": cell_name(point), "method": method})
        for spot, rows in self.found.items():
            told.setdefault(spot.line, {"cell": rows[0].cell, "method": rows[0].method})
        return told

    @cached_property
    def homes(self) -> Mapping[Line, list[str]]:
        """Line of the grid -> the models it asks for."""
        models: dict[Line, list[str]] = {}
        for spot in self.asked:
            models.setdefault(spot.line, []).append(spot.model)
        return {line: list(dict.fromkeys(names)) for line, names in models.items()}

    @cached_property
    def models(self) -> list[str]:
        """The models of the grid."""
        return list(dict.fromkeys(spot.model for spot in self.asked))

    @property
    def done(self) -> int:
        """How many points of the grid have results."""
        return sum(
            any(row.done and seed in ("", str(row.seed)) for row in self.found.get(spot, ()))
            for spot, seeds in self.asked.items()
            for seed in seeds
        )

    def home(self, spot: Spot) -> str:
        """The one model that its line is of; empty where it is of several, or of a foreign one."""
        if any(len(models) > 1 for models in self.homes.values()):
            return ""
        own = spot.model if spot.model in self.models else ""
        return self.homes.get(spot.line, [own])[0]

    def _line(self, point: Mapping[str, str]) -> Line:
        words = {key: self.experiment.word(point, key) for key in self.keys}
        return tuple((words | {"cell": cell_name(point)})[key] for key in self.keys)


def word_of(row: Row, key: str) -> str:
    """A run's word for an override."""
    told = {"cell": row.cell, "method": row.method}
    return told.get(key, row.settings.get(key, "")) or EMPTY


def _known(name: str, rows: Sequence[Row]) -> set[str]:
    return {row.settings[name] for row in rows if name in row.settings}


def _plain(word: str) -> str:
    """One word for a number however it is written: 1 becomes 1.0 where a setting is a float."""
    try:
        return repr(float(word))
    except ValueError:
        return word
