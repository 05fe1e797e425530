"""Names or numbers beside points that will move no more."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from emloc.report.draw.pareto import front
from emloc.report.draw.placing import Box, place, steps
from emloc.report.draw.style import GREY

_SIZE = 5.5
_RADIUS = 3.8  # points, of a marker and the gap around it
_GAP = 1.5  # points between labels side by side


def write(axes: Axes, points: Sequence[tuple[float, float]], words: Sequence[str]) -> None:
    """Write a label for each point (x, y), with a line to those that had to go further away.

    The layout has to be settled, since a label is placed by what is around it on the page.
    """
    scale = _points_of(axes)
    at = [(float(x) * scale, float(y) * scale) for x, y in axes.transData.transform(points)]
    edges = axes.get_window_extent()
    inside = Box(*(scale * edge for edge in (edges.x0, edges.y0, edges.x1, edges.y1)))
    stairs = steps([at[index] for index in front(points)])
    boxes = place(at, [_size(axes, word) for word in words], inside, _RADIUS, stairs)
    for word, point, (x, y), box in zip(words, points, at, boxes, strict=True):
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1.5}
        axes.annotate(
            word,
            point,
            xytext=((box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_SIZE,
            bbox={"pad": 0, "facecolor": "none", "edgecolor": "none"},
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
            arrowprops=line if box.away(x, y) > _RADIUS + 1 else None,
        )


def _size(axes: Axes, word: str) -> tuple[float, float]:
    """Width and height in points."""
    text = axes.text(0.5, 0.5, word, fontsize=_SIZE, transform=axes.transAxes)
    extent, scale = text.get_window_extent(), _points_of(axes)
    text.remove()
    return float(extent.width) * scale + _GAP, float(extent.height) * scale


def _points_of(axes: Axes) -> float:
    """Points of a pixel."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return 72 / figure.dpi
