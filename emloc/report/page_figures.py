"""Figures of a report as files, and as parts of its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc.report.figures import drawings, save, save_records
from emloc.report.page import FIGURES, NARROW, PageFigure
from emloc.report.rows import Row

_CSS_PIXELS = 140  # of an inch of a figure, so that its text is as large as the page's

_FORMATS = ("svg", "png", "pdf")


def write_figures(
    rows: Sequence[Row], place: Path, to: Path
) -> tuple[list[PageFigure], list[Path]]:
    """Write each figure with its numbers, and once more for narrow screens.

    Args:
        rows: the rows of `place`.
        place: a folder of runs, one run, or a file of rows.
        to: the folder of the report.

    Returns:
        What the page says of each figure, and all files.
    """
    wide, narrow = drawings(rows, place), drawings(rows, place, columns=1)
    paths = [
        *save({stem: one.figure for stem, one in wide.items()}, to / FIGURES, _FORMATS),
        *save_records(wide, to / FIGURES),
        *save({stem: one.figure for stem, one in narrow.items()}, to / NARROW, ("svg",)),
    ]
    widths = {stem: one.figure.get_size_inches()[0] for stem, one in wide.items()}
    figures = [
        PageFigure(stem, one.caption, one.alt, round(_CSS_PIXELS * widths[stem]))
        for stem, one in wide.items()
    ]
    return figures, paths
