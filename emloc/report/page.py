"""A report as one HTML page: tables, figures, the meaning of columns, and the runs' origin.

The page needs no network. Figures lie in files beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from emloc.report.table import Table, number, split

FIGURES = "figures"  # folder beside the page
NARROW = "figures/narrow"  # the same figures for narrow screens


@dataclass(frozen=True)
class PageFigure:
    """A figure on the page: stem of its files, caption, text for readers who cannot see it."""

    stem: str
    caption: str
    alt: str
    width: int  # in CSS pixels, where the screen is wide enough


@dataclass(frozen=True)
class Cell:
    """One cell of a table. `value` is the number it is sorted by, None for other words."""

    ours: str
    aside: str  # the paper's number, in brackets
    value: float | None
    is_best: bool

    @property
    def kind(self) -> str:
        """CSS class of the cell: number, empty, bad, or plain."""
        if self.value is not None:
            return "number"
        is_bad = self.ours == "OOM" or self.ours.startswith("failed(")
        return "bad" if is_bad else "plain" if self.ours or self.aside else "empty"


@dataclass(frozen=True)
class Section:
    """A table with its caption, notes for its readers, and the files that hold it."""

    caption: str
    table: Table
    notes: Sequence[str]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """Contents of a page."""

    title: str
    lead: Sequence[str]  # paragraphs
    sections: Sequence[Section]
    meanings: Mapping[str, str]  # column -> meaning
    figures: Sequence[PageFigure]
    origin: Mapping[str, Any]


def page(report: Report) -> str:
    """Return the HTML. All words that come from runs are escaped."""
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
        report=report,
        cells=_cells,
        facts=list(_facts(origin)),
        settings=settings,
        figures=FIGURES,
        narrow=NARROW,
    )


def _cells(table: Table) -> Iterator[list[Cell]]:
    for index, words in table.frame.iterrows():
        yield [
            Cell(*split(word), number(word), (index, column) in table.best)
            for column, word in words.items()
        ]


def _facts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and words of each fact. Facts within a mapping have dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{name}.")
        else:
            items = value if isinstance(value, list) else [value]
            yield f"{prefix}{name}", ", ".join(map(str, items)) or "unknown"
