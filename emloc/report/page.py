"""A report as one HTML file that needs nothing else: table, figures, and what it was made with."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from emloc.report.table import EMPTY, Table, number, split


@dataclass(frozen=True)
class Picture:
    """A figure as PNG bytes; `alt` says what it shows to who cannot see it."""

    caption: str
    alt: str
    png: bytes

    @property
    def data(self) -> str:
        """The bytes as text."""
        return b64encode(self.png).decode()


@dataclass(frozen=True)
class Cell:
    """A word of a table. `value`: what it is sorted by, None for a word that is no number."""

    ours: str
    aside: str  # the paper's, in brackets
    value: float | None
    best: bool

    @property
    def kind(self) -> str:
        """How it looks: number, empty, bad, or plain."""
        if self.value is not None:
            return "number"
        bad = self.ours == "OOM" or self.ours.startswith("failed(")
        return "bad" if bad else "empty" if self.ours == EMPTY else "plain"


@dataclass(frozen=True)
class Section:
    """A table with its caption, and what has to be known to read it."""

    caption: str
    table: Table
    notes: Sequence[str]


@dataclass(frozen=True)
class Report:
    """What a page is made of."""

    title: str
    lead: Sequence[str]  # paragraphs
    sections: Sequence[Section]
    pictures: Sequence[Picture]
    origin: Mapping[str, Any]


def page(report: Report) -> str:
    """The HTML. Every word of it that comes from a run is escaped."""
    environment = Environment(
        loader=PackageLoader("emloc.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    origin = dict(report.origin)
    settings = origin.pop("settings")
    return environment.get_template("report.html.j2").render(
        report=report, cells=_cells, facts=list(_facts(origin)), settings=settings
    )


def _cells(shown: Table) -> Iterator[list[Cell]]:
    for index, words in enumerate(shown.words()):
        columns = zip(shown.columns, words, strict=True)
        yield [
            Cell(*split(word), number(word), (index, column) in shown.best)
            for column, word in columns
        ]


def _facts(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Name and words of every fact, those of mappings by a dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{above}{name}.")
        else:
            known = value if isinstance(value, list) else [value]
            yield f"{above}{name}", ", ".join(map(str, known)) or EMPTY
