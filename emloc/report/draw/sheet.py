"""A figure of panels: its size, the one legend above the panels, and the note below them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from emloc.report.draw.style import COLUMN, GREY, PAGE, RC
from emloc.report.rows import Row

PANELS_PER_PAGE = 8
LEGEND_LABELS = 12  # that fit above a panel of one column
_LEGEND_LINES = 8  # that may stand above a narrow figure
_LINE = 0.135  # inches: height of a line of the legend
_MARGIN = 0.6  # inches: ticks and label beside a panel
_LETTER, _HANDLE = 0.055, 0.42  # inches: mean width of a letter, width of the symbol before a label


def panel_grid(
    count: int, columns: int, height: float = 2.3, is_wide: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, each as wide as a column of a paper.

    Args:
        count: number of panels.
        columns: panels beside each other, 1 or 2; 1 is for narrow screens.
        height: of one panel, in inches.
        is_wide: whether a single panel takes the width of two.
    """
    column_count = min(columns, count)
    rows = math.ceil(count / column_count)
    width = PAGE if column_count == 2 or (is_wide and columns == 2) else COLUMN
    figure = Figure((width, rows * height), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, column_count, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for one in axes[:count]:
        # The number of ticks depends on this size, also where the figure is shown without RC.
        one.tick_params(labelsize=RC["xtick.labelsize"])
    return figure, axes[:count]


def page_slices(count: int) -> list[slice]:
    """Return which panels stand on each page."""
    return [slice(start, start + PANELS_PER_PAGE) for start in range(0, count, PANELS_PER_PAGE)]


def add_legend(figure: Figure, note: str, order: Sequence[str] = (), title: str = "") -> None:
    """Add one legend for all labelled lines above the panels. The panels keep their size.

    In a narrow figure a long legend stands below the panels, with the note as its title.

    Args:
        figure: its panels are drawn.
        note: a line of text below the panels.
        order: labels that stand first in the legend.
        title: of the legend.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in order if label in handles]
    labels += [label for label in handles if label not in labels]
    width, height = figure.get_size_inches()
    if labels:
        columns = legend_columns(labels, width)
        is_below = width == COLUMN and len(labels) > columns * _LEGEND_LINES
        if is_below and not title:
            title, note = note, ""
        title = wrapped(title, width)
        lines = math.ceil(len(labels) / columns) + len(title.splitlines())
        height += _LINE * lines + 0.05
        figure.legend(
            [handles[label] for label in labels],
            labels,
            ncols=columns,
            title=title or None,
            loc="outside lower center" if is_below else "outside upper center",
        )
    if note:
        height += _LINE
        figure.supxlabel(note, x=0.01, ha="left", fontsize=6, color=GREY)
    figure.set_size_inches(width, height)


def wrapped(title: str, width: float = COLUMN - _MARGIN) -> str:
    """Return the title in lines that fit into `width` inches; without it, above one panel."""
    return textwrap.fill(title, int(width / _LETTER))


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns of a legend fit into `width` inches."""
    for columns in range(len(labels), 1, -1):
        # matplotlib fills a legend column by column; the first columns take the remainder.
        rows, remainder = divmod(len(labels), columns)
        starts = [index * rows + min(index, remainder) for index in range(columns + 1)]
        parts = [labels[start:end] for start, end in pairwise(starts)]
        if sum(_HANDLE + _LETTER * max(map(len, part)) for part in parts) <= width:
            return columns
    return 1


def settle_layout(figure: Figure) -> None:
    """Lay the figure out for good, so that distances on the page are known."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def percent(axis: Axis) -> None:
    """Write shares as percentages with as many digits as they need."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _percentage(value)))


def _percentage(share: float) -> str:
    return f"{round(100 * share, 9):g}%".replace("-", "\N{MINUS SIGN}")


def note_of(rows: Sequence[Row], formats: Sequence[str] = ()) -> str:
    """Return what hollow markers mean, and how many runs are in no figure and why."""
    failed = sum(row.state == "OOM" or row.state.startswith("failed") for row in rows)
    unfinished = sum(not row.done for row in rows) - failed
    packed = sorted({name for name in formats if name})
    parts = [f"hollow: {', '.join(packed)}"] if packed else []
    parts += [_count_runs(failed, "failed or ran out of memory")] if failed else []
    parts += [_count_runs(unfinished, "not finished")] if unfinished else []
    return "; ".join(parts)


def _count_runs(count: int, end: str) -> str:
    return f"{count} {'run' if count == 1 else 'runs'} {end}"
