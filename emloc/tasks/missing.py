"""Missing values of a data set's rows: a template that writes one fails, and rows are counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from emloc.errors import ConfigError

log = logging.getLogger(__name__)

FAIL, SKIP = "fail", "skip"


class MissingValueError(Exception):
    """A template writes or computes with the missing value of a column."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


class MissingValue:
    """Takes the place of a missing value in a template: false, equal to none, and no text.

    A template can therefore test it (`x is none`, `x or 'unknown'`), but cannot write it.
    """

    def __init__(self, column: str) -> None:
        self._column = column

    def _refuse(self, *_: Any) -> NoReturn:
        raise MissingValueError(self._column)

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, MissingValue)

    def __hash__(self) -> int:
        return hash(None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python and Jinja ask for optional methods
            raise AttributeError(name)
        self._refuse()

    __str__ = __repr__ = __format__ = __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __int__ = __float__ = __index__ = __neg__ = __abs__ = __round__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __call__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse


class MarkedRow(Mapping[str, Any]):
    """A row whose missing values are `MissingValue` objects.

    A value is missing if it is none, not a number, or the number -1 in a column of classes, which
    stands for "no class" in `datasets`.
    """

    def __init__(self, row: Mapping[str, Any], class_columns: frozenset[str] = frozenset()) -> None:
        self._row, self._class_columns = row, class_columns

    def __getitem__(self, column: str) -> Any:
        value = self._row[column]
        if column in self._class_columns and value == -1:
            value = None
        return mark_missing(value, column)

    def __contains__(self, column: object) -> bool:
        return column in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def class_columns(data: Any) -> frozenset[str]:
    """Names of the columns of a `datasets.Dataset` whose values are numbers of classes."""
    return frozenset(
        name for name, feature in data.features.items() if type(feature).__name__ == "ClassLabel"
    )


def mark_missing(value: Any, column: str) -> Any:
    """The value of a column with `MissingValue` in place of each none and each "not a number"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MissingValue(column)
    if isinstance(value, list):
        return [mark_missing(item, column) for item in value]
    if isinstance(value, dict):
        return {name: mark_missing(item, f"{column}.{name}") for name, item in value.items()}
    return value


def unmark_missing(value: Any) -> Any:
    """The value with none in place of each `MissingValue`."""
    if isinstance(value, MissingValue):
        return None
    if isinstance(value, list | tuple):
        return [unmark_missing(item) for item in value]
    if isinstance(value, dict):
        return {name: unmark_missing(item) for name, item in value.items()}
    return value


@dataclass
class IncompleteRows:
    """Rows of one split that lack a value, by what they lack; updated while rows are read."""

    rows: dict[str, list[str]] = field(default_factory=dict)  # what is missing -> names of rows

    def add(self, name: str, lack: str) -> None:
        """Count the row `name`, which lacks `lack`."""
        self.rows.setdefault(lack, []).append(name)

    def add_column(self, name: str, error: MissingValueError, setting: str) -> None:
        """Count the row `name`, where the template in `task.<setting>` writes a missing value."""
        self.add(name, f"no value in the column {error.column}, which task.{setting} writes")

    def report(self, task: str, split: str, total: int, policy: str) -> None:
        """Refuse incomplete rows, or log that they are skipped, as the setting `policy` says.

        Raises:
            ConfigError: there are such rows and `policy` is `fail`; names columns, rows and counts.
        """
        if not self.rows:
            return
        lacks = "; ".join(
            f"{len(names)} of {total} rows of {split} have {lack} (the first is {names[0]})"
            for lack, names in self.rows.items()
        )
        if policy == FAIL:
            raise ConfigError(
                f"task {task}: {lacks}; correct the rows, or set task.missing=skip to leave them "
                "out"
            )
        log.warning("task %s: left out: %s", task, lacks)


def refuse_policy(policy: str) -> None:
    """Check the setting `task.missing`.

    Raises:
        ConfigError: it is neither `fail` nor `skip`.
    """
    if policy not in (FAIL, SKIP):
        raise ConfigError(f"task.missing={policy}: set task.missing=fail or skip")
