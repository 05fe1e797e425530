"""A score against what it costs: every cell a point, those that nothing beats joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from emloc.report.draw.naming import write
from emloc.report.draw.panels import Panel, panels
from emloc.report.draw.pareto import front
from emloc.report.draw.series import ZERO_SHOT, Measure, Series, number, series
from emloc.report.draw.sheet import ROWS, blank, by_stem, finish, note_of, pages, percent
from emloc.report.draw.style import GREY, Look, looks_of
from emloc.report.rows import Row

NAMED = 15  # points of a panel with their names beside them; of more there are numbers, and a key
FEW = 3  # points that are a panel, if another has as many
WIDE = 8  # from the least cost to the greatest, where an axis becomes logarithmic


@dataclass(frozen=True)
class Cost:
    """One figure: what stands below it. None for what was not trained."""

    stem: str
    words: str
    measure: Measure


def _megabytes(row: Row) -> float | None:
    size = row.number("bytes")
    return None if size is None or "seconds/train" not in row.numbers else size / 1e6


def _seconds(row: Row) -> float | None:
    """Of all that comes before the evaluation; what was reused counts as when it was computed."""
    return row.cost_seconds if "seconds/train" in row.numbers else None


COSTS = (
    Cost("score_memory", "peak memory of training (GiB)", number("peak_gib/train")),
    Cost("score_weights", "weights trained through (MB)", _megabytes),
    Cost("score_time", "building, training and recovery (s)", _seconds),
)
_SCORES = ("score", "gain_kept")


@dataclass(frozen=True)
class Spot:
    """One cell in one panel."""

    line: Series
    x: float
    y: float
    spread: float


@dataclass(frozen=True)
class Scatter:
    """One panel."""

    panel: Panel
    score: str
    spots: Sequence[Spot]

    @property
    def points(self) -> list[tuple[float, float]]:
        """(cost, score) of each."""
        return [(spot.x, spot.y) for spot in self.spots]


def draw(rows: Sequence[Row], cost: Cost) -> Mapping[str, Figure]:
    """Stem -> page of panels: score, and gain where it is known, of a model, task and recipe.

    Where some have `FEW` points or more, those that have fewer are left out.
    """
    found = [
        Scatter(panel, score, _spots(series(panel.rows), cost.measure, number(score)))
        for panel in panels(rows)
        for score in _SCORES
    ]
    most = max((len(one.spots) for one in found), default=0)
    shown = [one for one in found if len(one.spots) >= max(2, min(most, FEW))]
    numbered = most > NAMED
    figures = [_page(shown[some], cost, numbered, rows) for some in pages(len(shown), 2 * ROWS)]
    return by_stem(cost.stem, figures)


def _page(shown: Sequence[Scatter], cost: Cost, numbered: bool, rows: Sequence[Row]) -> Figure:
    lines = [spot.line for one in shown for spot in one.spots]
    labels = sorted({line.label for line in lines})
    key = {label: str(i) for i, label in enumerate(labels, 1)} if numbered else {}
    looks = looks_of((line.method, line.method, False) for line in lines)
    figure, places = blank(len(shown), height=3.0 if numbered else 2.5)
    for one, axes in zip(shown, places, strict=True):
        gain = one.score != "score"
        words = "share of gain kept" if gain else one.panel.metric
        axes.set(title=one.panel.title, xlabel=cost.words, ylabel=words)
        if gain:
            percent(axes.yaxis)
        _scale(axes, [spot.x for spot in one.spots])
        _points(axes, one.spots, key, looks)
        _front(axes, one.points)
        _untouched(axes, one)
    note = note_of(rows, [line.packed for line in lines])
    finish(figure, note, [f"{key[label]}  {label}" for label in key])
    figure.draw_without_rendering()  # lays out what names are then placed in
    figure.set_layout_engine("none")
    for one, axes in zip(shown, places, strict=True):
        names = [key.get(spot.line.label, spot.line.label) for spot in one.spots]
        write(axes, one.points, names)
    return figure


def _spots(lines: Sequence[Series], cost: Measure, score: Measure) -> list[Spot]:
    found = []
    for line in lines:
        (point,) = line.points.values()
        x, y = point.value(cost), point.value(score)
        if x is not None and y is not None:
            found.append(Spot(line, x.mean, y.mean, y.spread))
    return found


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    if max(costs) > WIDE * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _points(
    axes: Axes, spots: Sequence[Spot], key: Mapping[str, str], looks: Mapping[str, Look]
) -> None:
    for spot in spots:
        line = spot.line
        look = looks[line.method]._replace(hollow=bool(line.packed))
        label = f"{key[line.label]}  {line.label}" if key else None
        axes.plot([spot.x], [spot.y], label=label, linestyle="", **look.marks)
        if spot.spread:
            bars: dict[str, Any] = {
                "fmt": "none",
                "ecolor": look.colour,
                "elinewidth": 0.7,
                "zorder": 1.5,
            }
            axes.errorbar([spot.x], [spot.y], [spot.spread], **bars)


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*(points[index] for index in front(points)), strict=True)
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 7.5,
        "markerfacecolor": "none",
        "markeredgewidth": 0.8,
    }
    steps: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 0.8, "color": GREY}
    axes.plot(x, y, label="Pareto front", **steps, **ring)


def _untouched(axes: Axes, one: Scatter) -> None:
    """The untouched model, which costs nothing, as a line across."""
    for line in series(one.panel.rows):
        value = next(iter(line.points.values())).value(number(one.score))
        if line.method == ZERO_SHOT and value:
            axes.axhline(value.mean, label=ZERO_SHOT, color=GREY, linestyle=":", zorder=1)
