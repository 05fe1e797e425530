"""A table of words, before it is Markdown, LaTeX or a page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

EMPTY = "."
_NUMBER = re.compile(r"([+-]?\d+(\.\d+)?(e[+-]?\d+)?)%?(?=[ ;]|$)")


@dataclass(frozen=True)
class Table:
    """`lines`: column -> word. `best`: (index of a line, column) of what is to stand out."""

    lines: Sequence[Mapping[str, str]]
    best: Collection[tuple[int, str]] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Every column, in the order it comes up."""
        return list(dict.fromkeys(column for line in self.lines for column in line))

    def words(self) -> Iterator[list[str]]:
        """A word of every column for each line."""
        columns = self.columns
        return ([line.get(column, EMPTY) for column in columns] for line in self.lines)

    def numeric(self, column: str) -> bool:
        """Whether numbers stand in it, beside words for what there is no number of; or nothing."""
        words = [line.get(column, EMPTY) for line in self.lines]
        return any(number(w) is not None for w in words) or all(split(w)[0] == EMPTY for w in words)


def split(word: str) -> tuple[str, str]:
    """Ours, and what stands in brackets behind it: `52.1 ± 0.3` and `(52.3)`; empty if nothing."""
    ours, space, aside = word.partition(" (")
    return ours, f"({aside}" if space else ""


def number(word: str) -> float | None:
    """What a word starts with, as `52.1` of `52.1 ± 0.3`; None if that is no number."""
    match = _NUMBER.match(word)
    return float(match[1]) if match else None


def best(
    lines: Sequence[Mapping[str, str]], peers: Sequence[Hashable], larger: Mapping[str, bool]
) -> set[tuple[int, str]]:
    """The best of each column among lines of equal `peers`; as shown, so that equals all stand out.

    `larger`: column -> whether larger is better. Nothing is best alone, or where all are equal.
    """
    fields = defaultdict(list)
    for index, peer in enumerate(peers):
        fields[peer].append(index)
    return {
        (index, column)
        for column, up in larger.items()
        for field in fields.values()
        for index in _leading([(i, number(lines[i].get(column, EMPTY))) for i in field], up)
    }


def _leading(field: Sequence[tuple[int, float | None]], up: bool) -> list[int]:
    known = [(value, index) for index, value in field if value is not None]
    values = {value for value, _ in known}
    if len(values) < 2:
        return []
    top = max(values) if up else min(values)
    return [index for value, index in known if value == top]
