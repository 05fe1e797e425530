"""A table of words, which is then written as Markdown, as LaTeX or on a page."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

EMPTY = ""  # the word of a cell to which nothing applies
_NUMBER = re.compile(r"([+-]?\d+(\.\d+)?(e[+-]?\d+)?)%?(?=[ ;]|$)")


@dataclass(frozen=True)
class Table:
    """`frame`: the words. `best`: (index of a line, column) of the cells that stand out."""

    frame: pd.DataFrame
    best: Collection[tuple[int, str]] = frozenset()

    @property
    def columns(self) -> list[str]:
        """The heads of all columns."""
        return [str(name) for name in self.frame]

    def marked(self, mark: str) -> pd.DataFrame:
        """The words, with our number of each best cell set into `mark`, such as `**{}**`."""
        frame = self.frame.copy()
        for index, column in self.best:
            ours, aside = split(frame.at[index, column])
            frame.at[index, column] = f"{mark.format(ours)} {aside}".rstrip()
        return frame

    def numeric(self, column: str) -> bool:
        """Whether the column has numbers, with or without words between them, or is empty."""
        words = self.frame[column]
        return bool(words.map(number).notna().any() or words.map(split).str[0].eq(EMPTY).all())


def split(word: str) -> tuple[str, str]:
    """Our number, and the paper's in brackets behind it: `52.1 ± 0.3` and `(52.3)`."""
    if word.startswith("("):
        return EMPTY, word
    ours, bracket, aside = word.partition(" (")
    return ours, f"({aside}" if bracket else EMPTY


def number(word: str) -> float | None:
    """The number at the start of a word, as 52.1 of `52.1 ± 0.3`; None if it starts otherwise."""
    match = _NUMBER.match(word)
    return float(match[1]) if match else None


def best(
    frame: pd.DataFrame, peers: Sequence[Hashable], larger: Mapping[str, bool]
) -> set[tuple[int, str]]:
    """The best cells of each column, among lines of equal `peers`.

    Numbers are compared as they are printed, so that equal words all stand out. No cell is the best
    where all are equal.

    Args:
        frame: words, with the index 0, 1, 2 ...
        peers: a value for each line.
        larger: column -> whether a larger number is better.
    """
    cells = set()
    for column, is_larger in larger.items():
        numbers = frame[column].map(number).astype(float)
        among = numbers.groupby(pd.Series(peers, index=frame.index, dtype=object))
        leads = numbers.eq(among.transform("max" if is_larger else "min"))
        leads &= among.transform("nunique").gt(1)
        cells |= {(int(index), column) for index in frame.index[leads]}
    return cells
