"""The paper's numbers, which lie in a file beside an experiment, and ours in their units."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emloc.errors import ConfigError
from emloc.report.rows import Row
from emloc.report.table import EMPTY, number

KEYS = ("cell", "method", "model", "task")
_VALUES = ("quantity", "value", "unit")


@dataclass(frozen=True)
class Quantity:
    """Something that both the paper and a run measure."""

    name: str
    unit: str  # in the paper's file
    head: str  # of our column, with the unit at its end
    digits: int
    parts: Sequence[str]  # numbers of a run that are added; a run must have the first
    times: float = 1.0  # from the unit of these numbers to the paper's
    per: float = 1.0

    def ours(self, row: Row) -> float | None:
        """The quantity of a run in the paper's unit; None if the run has no number."""
        if row.number(self.parts[0]) is None:
            return None
        return sum(row.number(name) or 0.0 for name in self.parts) * self.times / self.per

    def word(self, rows: Sequence[Row]) -> str:
        """Mean of these runs, ± the standard deviation of several; empty if one has no number."""
        values = [value for row in rows if (value := self.ours(row)) is not None]
        if len(values) < len(rows):
            return EMPTY
        mean = f"{statistics.mean(values):.{self.digits}f}"
        if len(values) == 1:
            return mean
        return f"{mean} ± {statistics.stdev(values):.{self.digits}f}"


_BUILD = ("seconds/emulate", "seconds/calibrate")
QUANTITIES = {
    "score": Quantity("score", "percent", "score %", 1, ["score"], times=100),
    "peak": Quantity("peak", "GB", "peak GB", 1, ["peak_gib/train"], times=2**30, per=1e9),
    "gpu_hours": Quantity("gpu_hours", "h", "build h", 2, _BUILD, per=3600),
}


@dataclass(frozen=True)
class Number:
    """One number of the paper. `keys`: the facts that a run must have to be compared with it."""

    keys: Mapping[str, str]  # experiment, model and others of KEYS
    quantity: str
    word: str  # as the paper prints it
    source: str  # in words
    where: str  # file and line

    def about(self, facts: Mapping[str, str]) -> bool:
        """Whether something with these facts is what the number is about."""
        return all(facts.get(key) == word for key, word in self.keys.items())


@dataclass(frozen=True)
class Paper:
    """The paper's numbers of one or several experiments."""

    numbers: Sequence[Number] = ()

    @property
    def sources(self) -> list[str]:
        """The tables that the numbers are from."""
        return list(dict.fromkeys(one.source for one in self.numbers))

    @property
    def quantities(self) -> list[str]:
        """The quantities that have numbers, in the order of QUANTITIES."""
        names = {one.quantity for one in self.numbers}
        return [name for name in QUANTITIES if name in names]

    def of_models(self, models: Iterable[str]) -> Paper:
        """The numbers of these models alone."""
        names = set(models)
        return Paper([one for one in self.numbers if one.keys["model"] in names])

    def find(self, quantity: str, facts: Mapping[str, str]) -> Number | None:
        """The number of a quantity that is about something with these facts.

        Raises:
            ConfigError: there are two.
        """
        numbers = [n for n in self.numbers if n.quantity == quantity and n.about(facts)]
        if len(numbers) > 1:
            raise ConfigError(
                f"{numbers[1].where}: a second {quantity} of what {numbers[0].where} is about; "
                "leave one out, or give both a key that tells them apart"
            )
        return numbers[0] if numbers else None


NO_PAPER = Paper()


def facts_of(row: Row) -> dict[str, str]:
    """The facts of a run that a number of the paper may name."""
    own = {key: getattr(row, key) for key in KEYS}
    return {"experiment": row.experiment} | own | {"method": row.named_method}


def paper_of(names: Iterable[str], folder: Path) -> Paper:
    """The numbers in `<folder>/<name>.csv`, where there is such a file.

    Raises:
        ConfigError: a file is not `# source`, then columns of KEYS, quantity, value and unit.
    """
    files = [path for name in dict.fromkeys(names) if (path := folder / f"{name}.csv").exists()]
    return Paper([one for path in files for one in _read(path)])


def _read(path: Path) -> list[Number]:
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    if not first.startswith("#"):
        raise ConfigError(f"{path}:1: say where the numbers are from, in a line that starts with #")
    table = csv.reader(lines)
    head = next(table, [])
    faults = {
        "no column": [name for name in ("model", *_VALUES) if name not in head],
        "unknown column": [name for name in head if name not in (*KEYS, *_VALUES)],
    }
    messages = [f"{fault} {', '.join(names)}" for fault, names in faults.items() if names]
    if messages:
        raise ConfigError(
            f"{path}:2: {'; '.join(messages)}; it takes {', '.join((*KEYS, *_VALUES))}, "
            "and needs all but cell, method and task"
        )
    source = first.lstrip("# ")
    numbers = []
    for words in filter(None, table):
        where = f"{path}:{table.line_num + 1}"
        if len(words) != len(head):
            raise ConfigError(f"{where}: {len(words)} values in {len(head)} columns")
        cells = dict(zip(head, words, strict=True))
        _check(cells, where)
        keys = {"experiment": path.stem} | {key: cells[key] for key in KEYS if cells.get(key)}
        numbers.append(Number(keys, cells["quantity"], cells["value"], source, where))
    return numbers


def _check(cells: Mapping[str, str], where: str) -> None:
    name, value, unit = (cells[column] for column in _VALUES)
    if name not in QUANTITIES:
        raise ConfigError(
            f"{where}: quantity {name} is not known; it takes {', '.join(QUANTITIES)}"
        )
    if unit != QUANTITIES[name].unit:
        raise ConfigError(f"{where}: {name} is given in {QUANTITIES[name].unit}, not in {unit}")
    if number(value) is None:
        raise ConfigError(f"{where}: value {value!r} is no number")
    if not cells["model"]:
        raise ConfigError(f"{where}: the number is of no model; fill in model")
