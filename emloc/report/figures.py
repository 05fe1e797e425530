"""Figures of a folder of runs, or of a file of rows.

Each model, task and recipe is a panel, eight panels are a page, and further pages have a number
behind their name. matplotlib is imported when a figure is requested, so that tables need no import.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc.config.folder_words import file_name
from emloc.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from emloc.report.draw.drawing import Drawing

_METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def figures(rows: Sequence[Row], place: Path) -> dict[str, Figure]:
    """Return file stem -> figure, for every figure that these runs have points for."""
    return {stem: drawing.figure for stem, drawing in drawings(rows, place).items()}


def drawings(rows: Sequence[Row], place: Path, columns: int = 2) -> dict[str, Drawing]:
    """Return file stem -> figure with its caption and its numbers.

    training_curve; score_ratio, gain_calibration and score_<setting> for settings with several
    values; score_memory, score_weights, score_time, score_forwards; correction_<model>_<task>;
    layers_<run> of at most three emulators.

    Args:
        rows: as `rows_of(place)` returns them.
        place: a folder of runs, one run, or a file of rows. A file has no curves and no layers.
        columns: panels beside each other; 1 is for narrow screens.
    """
    # Both log every font that they look for, and every part of a font that they write.
    for name in ("matplotlib.font_manager", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from matplotlib import rc_context

    from emloc.report.draw import correction, cost, curve, layers, sweep
    from emloc.report.draw.style import RC

    by_stem: dict[str, Drawing] = {}
    with rc_context(RC):
        by_stem |= curve.draw(rows, place, columns)
        for one in sweep.sweeps(rows):
            by_stem |= sweep.draw(rows, one, columns)
        for each in cost.COSTS:
            by_stem |= cost.draw(rows, each, columns)
        by_stem |= correction.draw(rows, place, columns)
        by_stem |= layers.draw(rows, place, columns)
    # Stems have names of models and tasks, which the folders of runs from elsewhere may choose.
    return {file_name(stem): drawing for stem, drawing in by_stem.items()}


def save(
    figures: Mapping[str, Figure], folder: Path, formats: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Write each figure in each format. The same figure gives the same bytes."""
    from matplotlib import rc_context

    from emloc.report.draw.style import RC

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context(RC):
        for stem, figure in figures.items():
            for suffix in formats:
                path = folder / f"{stem}.{suffix}"
                figure.savefig(path, metadata=_METADATA.get(suffix, {}))
                paths.append(path)
    return paths


def save_records(drawings: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Write the numbers of each figure as `<stem>.csv`."""
    paths = [folder / f"{stem}.csv" for stem in drawings]
    for path, drawing in zip(paths, drawings.values(), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            names = list(dict.fromkeys(name for record in drawing.records for name in record))
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(drawing.records)
    return paths
