"""Where markers stand, so that none covers another one or the point of another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RINGS = 24  # distances that are tried, each a quarter of a marker further than the last
_ANCHOR = 0.8  # half the width of the dot at a point whose marker stands beside it
_CROSSING = 0.1  # cost of a thin line behind a marker, in areas of a marker


class Box(NamedTuple):
    """A rectangle: left, bottom, right, top."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, half: float) -> Box:
        """Square of the width `2 * half` with its centre at (x, y)."""
        return cls(x - half, y - half, x + half, y + half)

    def overlap(self, other: Box) -> float:
        """Area that both rectangles cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def holds(self, other: Box) -> bool:
        """Whether the other rectangle lies within this one."""
        return (
            self.left <= other.left
            and self.bottom <= other.bottom
            and self.right >= other.right
            and self.top >= other.top
        )

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def marker_offsets(
    points: Sequence[tuple[float, float]], size: float, inside: Box, *, level: bool = False
) -> list[tuple[float, float]]:
    """Return how far each marker is moved from its point, (0, 0) where the point is free.

    A marker takes the nearest place at which it covers no other marker and no other point. Points
    with many neighbours choose last, so that lone markers stay. Of equal points one stays, and the
    others move to its sides.

    Args:
        points: (x, y) of each marker, in one unit of length.
        size: width of a marker in that unit.
        inside: the rectangle that markers must not leave.
        level: whether markers may only move to the left and to the right.
    """
    places_by_index: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda i: (_crowding(points, i, size), i)):
        anchors = [Box.around(*point, _ANCHOR) for point in points if point != points[index]]
        markers = [Box.around(*place, size / 2) for place in places_by_index.values()]
        surroundings = _Surroundings(
            point=points[index],
            size=size,
            inside=inside,
            anchors=anchors,
            markers=markers,
            lines=[
                (points[i], place) for i, place in places_by_index.items() if place != points[i]
            ],
        )
        places = list(_places(*points[index], size, level))
        free = next((place for place in places if surroundings.cost(place) == (0, 0)), None)
        places_by_index[index] = free or min(places, key=surroundings.cost)
    return [
        (places_by_index[i][0] - x, places_by_index[i][1] - y) for i, (x, y) in enumerate(points)
    ]


@dataclass(frozen=True)
class _Surroundings:
    """What a marker has to keep clear of."""

    point: tuple[float, float]  # that the marker stands for
    size: float
    inside: Box
    anchors: Sequence[Box]  # points of all other markers
    markers: Sequence[Box]  # that have their places
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]]  # from points to markers

    def cost(self, place: tuple[float, float]) -> tuple[float, float]:
        """Return how much the marker covers of other markers, then of points and lines.

        (0, 0) is a free place.
        """
        box = Box.around(*place, self.size / 2)
        outside = box.area - box.overlap(self.inside)
        covered = sum(box.overlap(marker) for marker in self.markers)
        points = sum(box.overlap(anchor) for anchor in self.anchors)
        line, start = (self.point, place), Box.around(*self.point, 0)
        crossings = sum(_crosses(other, box) for other in self.lines)
        crossings += sum(
            _crosses(line, marker) for marker in self.markers if not marker.holds(start)
        )
        return covered + outside, points + _CROSSING * box.area * crossings


def _crowding(points: Sequence[tuple[float, float]], index: int, size: float) -> int:
    """Count the other points whose markers would touch the one at `index`."""
    x, y = points[index]
    return sum(max(abs(x - a), abs(y - b)) < size for a, b in points) - 1


def _places(x: float, y: float, size: float, level: bool) -> Iterator[tuple[float, float]]:
    """The point itself, then places around it, the nearest first.

    On a ring the places to the right and left come first, since there a marker keeps its height.
    """
    yield x, y
    turns = [0, 8] if level else [0, 8, 1, 15, 7, 9, 2, 14, 6, 10, 3, 13, 5, 11, 4, 12]
    for ring in range(_RINGS):
        reach = size * (1 + ring / 4)
        for turn in turns:
            angle = 2 * math.pi * turn / 16
            yield x + reach * math.cos(angle), y + reach * math.sin(angle)


def _crosses(line: tuple[tuple[float, float], tuple[float, float]], box: Box) -> bool:
    """Whether a line from point to point meets the rectangle (Liang and Barsky's clipping)."""
    (x0, y0), (x1, y1) = line
    first, last = 0.0, 1.0
    for start, step, low, high in (
        (x0, x1 - x0, box.left, box.right),
        (y0, y1 - y0, box.bottom, box.top),
    ):
        if step == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        first, last = max(first, near), min(last, far)
    return first < last
