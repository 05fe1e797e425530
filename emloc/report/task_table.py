"""An experiment as a paper prints it: a line for each point of its grid, a column for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from emloc.report.grid_rows import Line, Placed, Spot, word_of
from emloc.report.groups import groups_of
from emloc.report.paper import Paper, Quantity
from emloc.report.rows import Row
from emloc.report.run_table import measured
from emloc.report.table import EMPTY, Table, best

READ = (
    "mean ± standard deviation over seeds, [2/3] where seeds are missing, then the paper's number "
    "in brackets; scores in percent, the best of ours in bold; a dot: not run"
)


def pivot(placed: Placed, paper: Paper, quantity: Quantity) -> Table:
    """Ours of each spot, then the paper's in brackets; the best of ours stands out in a column.

    A column is of the model its line is of, or names another. `[2/3]`: seeds done and asked for.

    Raises:
        ConfigError: the paper has two numbers for one spot.
    """
    numbers = [one for one in paper.numbers if one.quantity == quantity.name]
    view = _View(placed, Paper(numbers), quantity)
    lines = [view.line(*each) for each in view.lines]
    scores = [column.head for column in view.columns] if quantity.name == "score" else []
    return Table(lines, best(lines, [""] * len(lines), dict.fromkeys(scores, True)))


@dataclass(frozen=True)
class _Column:
    model: str  # empty: the one its line is of
    task: str

    @property
    def head(self) -> str:
        return f"{self.model}·{self.task}" if self.model else self.task


@dataclass(frozen=True)
class _View:
    """What stands where."""

    placed: Placed
    paper: Paper
    quantity: Quantity

    @cached_property
    def absent(self) -> dict[Spot, dict[str, str]]:
        """Where the paper has a number of what is neither asked for nor found: what it is of."""
        placed = self.placed
        absent: dict[Spot, dict[str, str]] = {}
        known = [self._facts(spot) for spot in (*placed.asked, *placed.found)]
        for number in self.paper.numbers:
            if any(map(number.about, known)):
                continue
            keys = dict(number.keys)
            named = {"cell": keys.get("method", EMPTY)} | keys
            line = tuple(named.get(key, EMPTY) for key in placed.keys)
            asked = [spot.task for spot in placed.asked if spot.model == keys["model"]]
            for task in [keys["task"]] if "task" in keys else asked or [EMPTY]:
                absent.setdefault(Spot(line, keys["model"], task), {}).update(keys)
        return absent

    @cached_property
    def spots(self) -> list[Spot]:
        """All of them: the grid's, the paper's others, and what else was run."""
        return list(dict.fromkeys((*self.placed.asked, *self.absent, *self.placed.found)))

    @cached_property
    def columns(self) -> list[_Column]:
        return list(dict.fromkeys(self._column(spot) for spot in self.spots))

    @cached_property
    def lines(self) -> list[tuple[Line, str, Line]]:
        """The grid's words, the model that all of it is of, and what else its runs have."""
        placed = self.placed
        more: dict[tuple[Line, str], dict[Line, None]] = {}
        for spot in self.spots:
            found = more.setdefault((spot.line, placed.home(spot)), {})
            found.update(dict.fromkeys(self._more(row) for row in placed.found.get(spot, ())))
        bare = (EMPTY,) * len(placed.more)
        return [(*line, each) for line, found in more.items() for each in found or [bare]]

    def line(self, line: Line, home: str, more: Line) -> dict[str, str]:
        """Column -> word."""
        placed = self.placed
        words = dict(zip(placed.keys, line, strict=True))
        if len(placed.models) > 1 and any(home for _, home, _ in self.lines):
            words["model"] = home or EMPTY
        words |= dict(zip(placed.more, more, strict=True))
        for column in self.columns:
            spot = Spot(line, column.model or home, column.task)
            words[column.head] = self._word(spot, more)
        return words

    def _word(self, spot: Spot, more: Line) -> str:
        rows = self.placed.found.get(spot, [])
        ours = [row for row in rows if self._more(row) == more]
        # Where they differ in more than the seed it is not said which of them are asked for.
        seeds = len(self.placed.asked.get(spot, ())) if len(ours) == len(rows) else 0
        groups = sorted(groups_of(ours), key=lambda group: not group[0].done)  # numbers first
        words = dict.fromkeys(self._of(group, seeds) for group in groups)
        number = self.paper.find(self.quantity.name, self._facts(spot))
        if number and self.quantity.name == "score" and not all(row.headline for row in ours):
            number = None  # of another metric
        return ("; ".join(words) or EMPTY) + (f" ({number.word})" if number else "")

    def _of(self, group: Sequence[Row], seeds: int) -> str:
        if not group[0].done:
            return group[0].state
        word = measured(group, self.quantity)
        return f"{word} [{len(group)}/{seeds}]" if len(group) < seeds else word

    def _facts(self, spot: Spot) -> Mapping[str, str]:
        """What a number of the paper may name of it."""
        told = self.placed.told.get(spot.line)
        told = self.absent.get(spot, {}) if told is None else told
        where = {"model": spot.model, "task": spot.task}
        return {"experiment": self.placed.experiment.name, **told, **where}

    def _column(self, spot: Spot) -> _Column:
        home = self.placed.home(spot) == spot.model
        return _Column("" if home else spot.model, spot.task)

    def _more(self, row: Row) -> Line:
        return tuple(word_of(row, name) for name in self.placed.more)
