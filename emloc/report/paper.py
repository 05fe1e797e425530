"""The paper's numbers, which lie in a file beside an experiment, and ours in their units."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emloc.errors import ConfigError
from emloc.report.rows import Row
from emloc.report.table import number

KEYS = ("cell", "method", "model", "task")
_VALUES = ("quantity", "value", "unit")


@dataclass(frozen=True)
class Quantity:
    """Something that the paper measured too."""

    name: str
    unit: str  # in the paper's file
    head: str  # of a column of ours, with the unit's sign at its end
    digits: int
    ours: Callable[[Row], float | None]  # of a run, in the same unit

    @property
    def sign(self) -> str:
        """Its unit in a head."""
        return self.head.split(" ")[-1]


def _score(row: Row) -> float | None:
    score = row.number("score")
    return None if score is None else 100 * score


def _peak(row: Row) -> float | None:
    gib = row.number("peak_gib/train")
    return None if gib is None else gib * 2**30 / 1e9


def _build_hours(row: Row) -> float | None:
    """Hours of calibrating, where there was any, and emulating."""
    emulate = row.number("seconds/emulate")
    return None if emulate is None else (emulate + (row.number("seconds/calibrate") or 0)) / 3600


QUANTITIES = {
    "score": Quantity("score", "percent", "score %", 1, _score),
    "peak": Quantity("peak", "GB", "peak GB", 1, _peak),
    "gpu_hours": Quantity("gpu_hours", "h", "build h", 2, _build_hours),
}


@dataclass(frozen=True)
class Number:
    """One number of the paper. `keys`: experiment, model and others of KEYS, all that it is of."""

    keys: Mapping[str, str]
    quantity: str
    word: str  # as it is printed there
    source: str  # in words
    where: str  # file and line

    def about(self, facts: Mapping[str, str]) -> bool:
        """Whether it is of what these facts are of."""
        return all(facts.get(key) == word for key, word in self.keys.items())


@dataclass(frozen=True)
class Paper:
    """The paper's numbers of one or several experiments."""

    numbers: Sequence[Number] = ()

    @property
    def sources(self) -> list[str]:
        """Where its numbers are from."""
        return list(dict.fromkeys(one.source for one in self.numbers))

    @property
    def quantities(self) -> list[str]:
        """What there are numbers of, in the order of QUANTITIES."""
        return [name for name in QUANTITIES if any(n.quantity == name for n in self.numbers)]

    def of_models(self, models: Iterable[str]) -> Paper:
        """Its numbers of these models alone."""
        known = set(models)
        return Paper([one for one in self.numbers if one.keys["model"] in known])

    def find(self, quantity: str, facts: Mapping[str, str]) -> Number | None:
        """Its number of what these facts are of.

        Raises:
            ConfigError: there are two.
        """
        found = [n for n in self.numbers if n.quantity == quantity and n.about(facts)]
        if len(found) > 1:
            raise ConfigError(
                f"{found[1].where}: a second {quantity} of what {found[0].where} is about; "
                "leave one out, or give both a key that tells them apart"
            )
        return found[0] if found else None


def facts_of(row: Row) -> dict[str, str]:
    """What a number of the paper may name of a run."""
    return {"experiment": row.experiment} | {key: getattr(row, key) for key in KEYS}


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
    unknown = [name for name in head if name not in (*KEYS, *_VALUES)]
    missing = [name for name in ("model", *_VALUES) if name not in head]
    if unknown or missing:
        raise ConfigError(
            f"{path}:2: {_listed('no column', missing)}{_listed('unknown column', unknown)}"
            f"it takes {', '.join((*KEYS, *_VALUES))}, and needs all but cell, method and task"
        )
    source = first.lstrip("# ")
    numbers = []
    for words in filter(None, table):
        where = f"{path}:{table.line_num + 1}"
        if len(words) != len(head):
            raise ConfigError(f"{where}: {len(words)} values in {len(head)} columns")
        given = dict(zip(head, words, strict=True))
        _check(given, where)
        keys = {"experiment": path.stem} | {key: given[key] for key in KEYS if given.get(key)}
        numbers.append(Number(keys, given["quantity"], given["value"], source, where))
    return numbers


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{what} {', '.join(names)}; " if names else ""


def _check(given: Mapping[str, str], where: str) -> None:
    name, value, unit = (given[column] for column in _VALUES)
    if name not in QUANTITIES:
        known = ", ".join(QUANTITIES)
        raise ConfigError(f"{where}: quantity {name} is not known; it takes {known}")
    if unit != QUANTITIES[name].unit:
        raise ConfigError(f"{where}: {name} is given in {QUANTITIES[name].unit}, not in {unit}")
    if number(value) is None:
        raise ConfigError(f"{where}: value {value!r} is no number")
    if not given["model"]:
        raise ConfigError(f"{where}: it is not said of which model it is; fill in model")
