"""Markers of a panel, each at its point or beside it, so that all of them are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.transforms import ScaledTranslation

from emloc.report.draw.placing import Box, marker_offsets
from emloc.report.draw.style import GREY, Style

DISC = 9.0  # points: width of a marker that holds a number, with the gap to the next one
SYMBOL = 4.0  # points: width of a marker without a number
_EDGE = 1.0  # points: edge of a marker and half the gap to the next one
_FONT = 5.0
_ABOVE_LINES = 4

HOLLOW = "Hollow markers train through packed weights."
MOVED = "A marker that has no room at its point stands beside it, with a thin line to the point."


@dataclass(frozen=True)
class Marker:
    """One marker: the point that it stands for in data coordinates, its style, its number."""

    x: float
    y: float
    style: Style
    number: str = ""


def draw_markers(axes: Axes, markers: Sequence[Marker], *, level: bool = False) -> bool:
    """Draw all markers of a panel, and return whether one had to be moved from its point.

    A marker that is moved has a thin line to a dot at its point.

    The layout of the figure and the limits of the axes must be final, since distances between
    markers are distances on the page. With `level`, markers keep their height.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.autoscale(False)
    points_per_pixel = 72 / figure.dpi
    pixels = axes.transData.transform([(marker.x, marker.y) for marker in markers])
    points = [(float(x) * points_per_pixel, float(y) * points_per_pixel) for x, y in pixels]
    edges = axes.get_window_extent()
    inside = Box(*(points_per_pixel * e for e in (edges.x0, edges.y0, edges.x1, edges.y1)))
    width = DISC if any(marker.number for marker in markers) else SYMBOL + 2 * _EDGE
    offsets = marker_offsets(points, width, inside, level=level)
    for marker, (right, up) in zip(markers, offsets, strict=True):
        _draw_marker(axes, marker, right, up)
    return any(right or up for right, up in offsets)


def _draw_marker(axes: Axes, marker: Marker, right: float, up: float) -> None:
    """Draw one marker, `right` and `up` points away from its point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    offset = ScaledTranslation(right / 72, up / 72, figure.dpi_scale_trans)
    if right or up:
        axes.annotate(
            "",
            (marker.x, marker.y),
            xytext=(right, up),
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.4,
                "shrinkA": 0,
                "shrinkB": 0,
                "zorder": _ABOVE_LINES - 0.5,
            },
        )
        axes.plot(
            [marker.x],
            [marker.y],
            marker="o",
            markersize=1.6,
            markeredgewidth=0,
            color=marker.style.colour,
            zorder=_ABOVE_LINES - 0.4,
            label="_point",
        )
    axes.plot(
        [marker.x],
        [marker.y],
        **marker.style.marker_properties,
        markersize=DISC - _EDGE if marker.number else SYMBOL,
        markeredgewidth=0.8,
        label="_marker",
        linestyle="",
        clip_on=False,
        zorder=_ABOVE_LINES,
        transform=axes.transData + offset,
    )
    if marker.number:
        axes.annotate(
            marker.number,
            (marker.x, marker.y),
            xytext=(right, up - 0.2),  # digits look centred a little below the centre of the text
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT,
            color=_ink(marker.style),
            zorder=_ABOVE_LINES + 1,
        )


def _ink(style: Style) -> str:
    """Colour of a number on a marker: black on bright colours and on white, else white."""
    red, green, blue = to_rgb("white" if style.is_hollow else style.colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
