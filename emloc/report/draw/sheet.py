"""A figure of panels: its size, its one legend above them, and the note below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from emloc.report.draw.style import COLUMN, GREY, PAGE
from emloc.report.rows import Row

ROWS = 4  # of panels on one page
_LINE = 0.135  # inches of a line of the legend
_LETTER, _HANDLE = 0.055, 0.42  # inches of a letter in it, on average, and of all before it


def blank(count: int, height: float = 2.3, wide: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each a column of a paper wide, two beside each other.

    Args:
        wide: a single panel takes the width of two.
    """
    columns = min(2, count)
    rows = math.ceil(count / 2)
    width = PAGE if columns == 2 or wide else COLUMN
    figure = Figure((width, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def pages(count: int, each: int) -> list[slice]:
    """What stands on each page."""
    return [slice(start, start + each) for start in range(0, count, each)]


def stems(stem: str, count: int) -> list[str]:
    """Names of pages: the second and later ones are numbered."""
    return [stem if page == 0 else f"{stem}_{page + 1}" for page in range(count)]


def finish(figure: Figure, note: str, order: Sequence[str] = (), title: str = "") -> None:
    """One legend of all labelled lines above the panels, which grow no smaller by it.

    Args:
        figure: with its panels drawn.
        note: a line below them.
        order: the labels that stand first in the legend.
        title: of the legend, and so of the figure.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [*(label for label in order if label in handles)]
    labels += [label for label in handles if label not in labels]
    width, height = figure.get_size_inches()
    if labels:
        columns = columns_of(labels, width)
        height += _LINE * (math.ceil(len(labels) / columns) + bool(title)) + 0.05
        drawn = [handles[label] for label in labels]
        told: dict[str, Any] = {"loc": "outside upper center", "title": title or None}
        figure.legend(drawn, labels, ncols=columns, **told)
    if note:
        height += _LINE
        figure.supxlabel(note, x=0.01, ha="left", fontsize=6, color=GREY)
    figure.set_size_inches(width, height)


def columns_of(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend fit into `width` inches; it is filled column by column."""
    for columns in range(len(labels), 1, -1):
        # The first columns hold one more where they cannot all hold as many.
        rows, more = divmod(len(labels), columns)
        starts = [index * rows + min(index, more) for index in range(columns + 1)]
        parts = [labels[a:b] for a, b in pairwise(starts)]
        if sum(_HANDLE + _LETTER * max(map(len, part)) for part in parts) <= width:
            return columns
    return 1


def percent(axis: Axis) -> None:
    """Write shares as percentages, of as many digits as they need."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _percentage(value)))


def _percentage(share: float) -> str:
    return f"{round(100 * share, 9):g}%".replace("-", "\N{MINUS SIGN}")


def note_of(rows: Sequence[Row], packed: Sequence[str] = ()) -> str:
    """Of which format hollow markers are, and how many runs are in no figure, and why."""
    ended = sum(row.state == "OOM" or row.state.startswith("failed") for row in rows)
    going = sum(not row.done for row in rows) - ended
    formats = sorted({name for name in packed if name})
    said = [f"hollow: {', '.join(formats)}"] if formats else []
    said += [_runs(ended, "failed or ran out of memory")] if ended else []
    said += [_runs(going, "not finished")] if going else []
    return "; ".join(said)


def _runs(count: int, what: str) -> str:
    return f"{count} {'run' if count == 1 else 'runs'} {what}"


def by_stem(stem: str, figures: Sequence[Figure]) -> Mapping[str, Figure]:
    """Pages with their names."""
    return dict(zip(stems(stem, len(figures)), figures, strict=True))
