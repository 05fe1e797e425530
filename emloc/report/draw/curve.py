"""Training curves: loss against step, a line for each method, mean over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from emloc.report.draw.drawing import Drawing, numbered_pages
from emloc.report.draw.panels import Panel, panels
from emloc.report.draw.round_marks import (
    ORIGINAL,
    REJECTED,
    RoundMark,
    draw_round_marks,
    round_marks,
    round_records,
)
from emloc.report.draw.series import Series, Value, series
from emloc.report.draw.sheet import (
    LEGEND_LABELS,
    add_legend,
    note_of,
    page_slices,
    panel_grid,
    wrapped,
)
from emloc.report.draw.style import FADED, line_styles
from emloc.report.rows import Row
from emloc.report.rows.run_files import read_run_file

_DASH = 4.0  # widths of a line

Dashes = tuple[float, tuple[float, float]]  # offset, and lengths of dash and gap


@dataclass(frozen=True)
class Curve:
    """Mean and deviation of the loss of one line, step -> value; the marks of its rounds."""

    line: Series
    losses: Mapping[int, Value]
    seeds: int
    marks: Sequence[RoundMark] = ()


def draw(rows: Sequence[Row], place: Path, columns: int) -> Mapping[str, Drawing]:
    """Return `training_curve` -> page of panels, one for each model, task and recipe."""
    curve_panels = [
        (panel, curves) for panel in panels(rows) if (curves := _curves(series(panel.rows), place))
    ]
    pages = [_page(curve_panels[part], columns, rows) for part in page_slices(len(curve_panels))]
    return numbered_pages("training_curve", pages)


def _curves(lines: Sequence[Series], place: Path) -> list[Curve]:
    """Return the curves of all lines whose runs recorded the loss of at least two steps."""
    curves = []
    for line in lines:
        losses = [_losses(place, row) for row in line.rows]
        shared = [step for step in losses[0] if all(step in one for one in losses)]
        if len(shared) > 1:
            values = {step: Value.over([one[step] for one in losses]) for step in shared}
            curves.append(Curve(line, values, len(losses), round_marks(place, line.rows)))
    return curves


def _losses(place: Path, row: Row) -> dict[int, float]:
    """Return step -> training loss of one run, in the order of the file."""
    lines = map(json.loads, read_run_file(place, row, "curve.jsonl").splitlines())
    return {line["step"]: line["loss"] for line in lines}


def _page(
    curve_panels: Sequence[tuple[Panel, Sequence[Curve]]], columns: int, rows: Sequence[Row]
) -> Drawing:
    curves = [curve for _, some in curve_panels for curve in some]
    styles = line_styles((c.line.label, c.line.method, bool(c.line.packed)) for c in curves)
    figure, places = panel_grid(len(curve_panels), columns, is_wide=len(styles) > LEGEND_LABELS)
    for (panel, some), axes in zip(curve_panels, places, strict=True):
        axes.set(title=wrapped(panel.title), xlabel="training step", ylabel="training loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for curve, dashes in zip(some, _dashes(some), strict=True):
            style = styles[curve.line.label]
            steps = list(curve.losses)
            means = [value.mean for value in curve.losses.values()]
            spreads = [value.spread for value in curve.losses.values()]
            axes.plot(
                steps,
                means,
                label=curve.line.label,
                color=style.colour,
                linestyle=dashes or style.dash,
                marker=style.marker if curve.marks else "",
                markevery=[],  # the legend shows the marker of the rounds
            )
            draw_round_marks(axes, curve.marks, style)
            if any(spreads):
                low, high = (
                    [mean + sign * spread for mean, spread in zip(means, spreads, strict=True)]
                    for sign in (-1, 1)
                )
                axes.fill_between(steps, low, high, color=style.colour, alpha=FADED, linewidth=0)
    add_legend(figure, note_of(rows), sorted(styles))
    return Drawing(figure, _caption(curves), _records(curve_panels))


def _dashes(curves: Sequence[Curve]) -> list[Dashes | None]:
    """Return dashes that alternate where several curves are equal, so that all of them are seen.

    Methods that differ only in the recovery share their training, and so their curve.
    """
    dashes: list[Dashes | None] = []
    for curve in curves:
        equals = [other.line.label for other in curves if other.losses == curve.losses]
        turn, gap = equals.index(curve.line.label), _DASH * (len(equals) - 1)
        dashes.append((-_DASH * turn, (_DASH, gap)) if gap else None)
    return dashes


def _caption(curves: Sequence[Curve]) -> str:
    sentences = ["The training loss against the training step, with a line for each method."]
    if any(_dashes(curves)):
        sentences.append("Methods with one training share a line of alternating colours.")
    if any(curve.seeds > 1 for curve in curves):
        sentences.append("Lines are means over seeds, bands are the standard deviation.")
    marks = [mark for curve in curves for mark in curve.marks]
    if marks:
        sentences.append(ORIGINAL)
    if any(mark.is_rejected for mark in marks):
        sentences.append(REJECTED)
    return " ".join(sentences)


def _records(curve_panels: Sequence[tuple[Panel, Sequence[Curve]]]) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for panel, curves in curve_panels:
        for curve in curves:
            labels = {"panel": panel.title, "label": curve.line.label}
            records += [
                {
                    **labels,
                    "step": step,
                    "mean loss (nats)": value.mean,
                    "standard deviation": value.spread,
                    "seeds": curve.seeds,
                }
                for step, value in curve.losses.items()
            ]
            records += [{**labels, **record} for record in round_records(curve.marks)]
    return records
