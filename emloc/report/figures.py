"""The figures of a folder of runs, or of a file of rows.

Every model, task and recipe is a panel of its own, eight at most to a page; further pages have a
number behind their name. Imports matplotlib when a figure is asked for: tables wait for no import.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emloc.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(rows: Sequence[Row], place: Path) -> dict[str, Figure]:
    """File stem -> figure, of those that have something to show.

    score_ratio, gain_calibration, score_<setting> of what was swept; score_memory, score_weights,
    score_time; layers_<run> of at most three emulators.

    Args:
        rows: as `rows_of(place)` gives them.
        place: a folder of runs, one run, or a file of rows, which has no layers to show.
    """
    # They tell of each font that is looked for, and of each part of one that is written.
    for name in ("matplotlib.font_manager", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from matplotlib import rc_context

    from emloc.report.draw import cost, layers, sweep
    from emloc.report.draw.style import RC

    found: dict[str, Figure] = {}
    with rc_context(RC):
        for one in sweep.sweeps(rows):
            found |= sweep.draw(rows, one)
        for each in cost.COSTS:
            found |= cost.draw(rows, each)
        found |= layers.draw(rows, place)
    return found


def save(
    figures: Mapping[str, Figure], folder: Path, forms: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Write each in these forms: the same figure gives the same bytes."""
    from matplotlib import rc_context

    from emloc.report.draw.style import RC

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(RC):
        for stem, figure in figures.items():
            for form in forms:
                path = folder / f"{stem}.{form}"
                figure.savefig(path, metadata={"CreationDate": None} if form == "pdf" else {})
                written.append(path)
    return written
