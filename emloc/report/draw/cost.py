"""A score against its cost: a numbered point for each method or cell, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from emloc.report.draw.drawing import Drawing, numbered_pages
from emloc.report.draw.markers import DISC, HOLLOW, MOVED, Marker, draw_markers
from emloc.report.draw.pairs import unanchored
from emloc.report.draw.panels import Panel, panels
from emloc.report.draw.pareto import front
from emloc.report.draw.series import ZERO_SHOT, Measure, Series, number, series
from emloc.report.draw.sheet import (
    add_legend,
    note_of,
    page_slices,
    panel_grid,
    percent,
    settle_layout,
    wrapped,
)
from emloc.report.draw.style import GREY, Style, line_styles
from emloc.report.rows import Row

_FEW = 3  # points of a panel; panels with fewer are left out beside such a panel
_SQUARES = "Squares are methods with anchors."
_ARROWS = "An arrow leads to a method with anchors from the same emulator without them."
_WIDE = 8  # largest cost by smallest cost, above which the axis becomes logarithmic


@dataclass(frozen=True)
class Cost:
    """Horizontal axis of one figure. `measure` is None for runs that train nothing."""

    stem: str
    caption: str
    measure: Measure


def _megabytes(row: Row) -> float | None:
    size = row.number("bytes")
    return None if size is None or "seconds/train" not in row.numbers else size / 1e6


def _seconds(row: Row) -> float | None:
    """Seconds of all stages before evaluation; a cached stage counts as when it was computed."""
    return row.cost_seconds if "seconds/train" in row.numbers else None


def _forwards(row: Row) -> float | None:
    """Arithmetic of all stages before evaluation, in forwards of the original over one row."""
    rows = row.number("trained_rows")
    return None if row.forwards is None or rows is None else row.forwards * rows


COSTS = (
    Cost("score_memory", "peak memory of training (GiB)", number("peak_gib/train")),
    Cost("score_weights", "weights trained through (MB)", _megabytes),
    Cost("score_time", "time for building, training and recovery (s)", _seconds),
    Cost("score_forwards", "arithmetic of all stages (forwards of the original)", _forwards),
)
_SCORES = ("score", "gain_kept")


@dataclass(frozen=True)
class CostPoint:
    """Runs of one method or cell in one panel: mean cost, mean score, deviation of the score."""

    line: Series
    cost: float
    score: float
    spread: float


@dataclass(frozen=True)
class CostPanel:
    """One panel: `score` is the name of the number on its vertical axis."""

    panel: Panel
    score: str
    points: Sequence[CostPoint]

    @property
    def score_label(self) -> str:
        """Label of the vertical axis."""
        return self.panel.score_label(self.score)

    @property
    def coordinates(self) -> list[tuple[float, float]]:
        """(cost, score) of each point."""
        return [(point.cost, point.score) for point in self.points]


def draw(rows: Sequence[Row], cost: Cost, columns: int) -> Mapping[str, Drawing]:
    """Return file stem -> page of panels: score, and gain where it is measured.

    There is a panel for each model, task and recipe. A panel with fewer than three points is left
    out where another panel has three or more.
    """
    every = [
        CostPanel(panel, score, _points(series(panel.rows), cost.measure, number(score)))
        for panel in panels(rows)
        for score in _SCORES
    ]
    most = max((len(one.points) for one in every), default=0)
    cost_panels = [one for one in every if len(one.points) >= max(2, min(most, _FEW))]
    pages = [
        _page(cost_panels[part], cost, columns, rows) for part in page_slices(len(cost_panels))
    ]
    return numbered_pages(cost.stem, pages)


def _page(
    cost_panels: Sequence[CostPanel], cost: Cost, columns: int, rows: Sequence[Row]
) -> Drawing:
    lines = [point.line for one in cost_panels for point in one.points]
    numbers = {label: str(i) for i, label in enumerate(sorted({line.label for line in lines}), 1)}
    methods = line_styles((line.method, line.method, False) for line in lines)
    styles = {
        line.label: methods[line.method]._replace(
            marker="s" if line.is_anchored else "o", is_hollow=bool(line.packed)
        )
        for line in lines
    }
    figure, places = panel_grid(len(cost_panels), columns, height=2.8)
    for one, axes in zip(cost_panels, places, strict=True):
        axes.set(title=wrapped(one.panel.title), xlabel=cost.caption, ylabel=one.score_label)
        if one.score == "gain_kept":
            percent(axes.yaxis)
        _scale(axes, [point.cost for point in one.points])
        _label_points(axes, one.points, numbers, styles)
        _draw_pairs(axes, one.points, styles)
        _draw_front(axes, one.coordinates)
        _draw_untrained(axes, one)
    key = [f"{numbers[label]}  {label}" for label in numbers]
    add_legend(figure, note_of(rows, [line.packed for line in lines]), key)
    settle_layout(figure)
    is_moved = False
    for one, axes in zip(cost_panels, places, strict=True):
        markers = [
            Marker(point.cost, point.score, styles[label], numbers[label])
            for point in one.points
            for label in [point.line.label]
        ]
        is_moved |= draw_markers(axes, markers)
    return Drawing(
        figure, _caption(cost_panels, cost, is_moved), _records(cost_panels, cost, numbers)
    )


def _points(lines: Sequence[Series], cost: Measure, score: Measure) -> list[CostPoint]:
    points = []
    for line in lines:
        (point,) = line.points.values()
        x, y = point.value(cost), point.value(score)
        if x is not None and y is not None:
            points.append(CostPoint(line, x.mean, y.mean, y.spread))
    return points


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    if max(costs) > _WIDE * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _label_points(
    axes: Axes,
    points: Sequence[CostPoint],
    numbers: Mapping[str, str],
    styles: Mapping[str, Style],
) -> None:
    """Add points to the limits and the legend of the axes. Their markers follow later."""
    axes.margins(0.09)  # room for a marker at the edge
    for point in points:
        label = point.line.label
        axes.plot(
            [point.cost],
            [point.score],
            label=f"{numbers[label]}  {label}",
            linestyle="",
            markevery=[],
            **styles[label].marker_properties,
            markersize=DISC - 3,
        )
        if point.spread:
            axes.errorbar(
                [point.cost],
                [point.score],
                [point.spread],
                fmt="none",
                ecolor=styles[label].colour,
                elinewidth=0.7,
                zorder=1.5,
            )


def _draw_pairs(axes: Axes, points: Sequence[CostPoint], styles: Mapping[str, Style]) -> None:
    """Draw an arrow to each method with anchors, from the same method without them."""
    for before, after in _pairs(points):
        axes.annotate(
            "",
            (after.cost, after.score),
            xytext=(before.cost, before.score),
            arrowprops={
                "arrowstyle": "->",
                "color": styles[after.line.label].colour,
                "linewidth": 0.8,
                "shrinkA": DISC / 2,
                "shrinkB": DISC / 2,
                "zorder": 1.6,
            },
        )


def _pairs(points: Sequence[CostPoint]) -> list[tuple[CostPoint, CostPoint]]:
    """Points of the same method without and with anchors."""
    partners = [unanchored(point.line, [other.line for other in points]) for point in points]
    return [
        (next(point for point in points if point.line is partner), after)
        for after, partner in zip(points, partners, strict=True)
        if partner is not None
    ]


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*(points[index] for index in front(points)), strict=True)
    axes.plot(x, y, label="Pareto front", drawstyle="steps-post", linewidth=0.8, color=GREY)


def _draw_untrained(axes: Axes, one: CostPanel) -> None:
    """Draw the untrained model, which costs nothing, as a line across."""
    for line in series(one.panel.rows):
        value = next(iter(line.points.values())).value(number(one.score))
        if line.method == ZERO_SHOT and value:
            axes.axhline(value.mean, label=ZERO_SHOT, color=GREY, linestyle=":", zorder=1)


def _caption(cost_panels: Sequence[CostPanel], cost: Cost, is_moved: bool) -> str:
    scores = " and the ".join(dict.fromkeys(one.score_label for one in cost_panels))
    sentences = [
        f"The {scores} against the {cost.caption}.",
        "Each number is one method or cell; the key above the panels names it.",
        *([MOVED] if is_moved else []),
        "Grey steps are the Pareto front: no other point costs less and scores higher.",
    ]
    if any(point.spread for one in cost_panels for point in one.points):
        sentences.append("Vertical bars are the standard deviation over seeds.")
    if any(point.line.packed for one in cost_panels for point in one.points):
        sentences.append(HOLLOW)
    if any(point.line.is_anchored for one in cost_panels for point in one.points):
        sentences.append(_SQUARES)
    if any(_pairs(one.points) for one in cost_panels):
        sentences.append(_ARROWS)
    return " ".join(sentences)


def _records(
    cost_panels: Sequence[CostPanel], cost: Cost, numbers: Mapping[str, str]
) -> list[dict[str, object]]:
    return [
        {
            "panel": one.panel.title,
            "number": int(numbers[point.line.label]),
            "label": point.line.label,
            cost.caption: point.cost,
            "quantity": one.score_label,
            "mean": point.score,
            "standard deviation": point.spread,
        }
        for one in cost_panels
        for point in one.points
    ]
