"""Rows for templates: a missing value cannot be written, and a number has its written text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

_INTEGER = re.compile(r"[+-]?\d+")


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


class _Written:
    """A number that is written as the cell of a file is."""

    text: str

    def __new__(cls, value: float, text: str) -> Self:
        """A number with its text."""
        number = super().__new__(cls, value)  # type: ignore[call-arg] # of int or float
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class WrittenInteger(_Written, int):
    """An integer that is written as the cell of a file is, such as 007."""


class WrittenFraction(_Written, float):
    """A fraction that is written as the cell of a file is, such as 0.50."""


@dataclass(frozen=True)
class RowMarks:
    """What templates must know of the rows of a split beside their values."""

    class_columns: frozenset[str] = frozenset()  # columns of numbers of classes
    # Column -> its cells as a file has them, where Python would write their values otherwise.
    cells: Mapping[str, list[str]] = field(default_factory=dict)

    def mark(self, row: Mapping[str, Any], index: int) -> MarkedRow:
        """The row at `index` for templates."""
        return MarkedRow(row, self, index)


class MarkedRow(Mapping[str, Any]):
    """A row for templates: its missing values are `MissingValue` objects.

    A value is missing if it is none, not a number, or the number -1 in a column of classes, which
    stands for "no class" in `datasets`. A number from a CSV file is written as in the file.
    """

    def __init__(
        self, row: Mapping[str, Any], marks: RowMarks | None = None, index: int = 0
    ) -> None:
        self._row, self._marks, self._index = row, marks or RowMarks(), index

    def __getitem__(self, column: str) -> Any:
        value = self._row[column]
        if column in self._marks.class_columns and value == -1:
            value = None
        if value is not None and column in self._marks.cells:
            return _as_written(value, self._marks.cells[column][self._index])
        return mark_missing(value, column)

    def __contains__(self, column: object) -> bool:
        return column in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def _as_written(value: float, text: str) -> float:
    """The value of a cell with the cell's text."""
    if isinstance(value, int):  # also true and false
        return WrittenInteger(value, text)
    return (
        WrittenInteger(int(text), text)
        if _INTEGER.fullmatch(text)
        else WrittenFraction(value, text)
    )


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
