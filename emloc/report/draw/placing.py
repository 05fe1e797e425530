"""Where labels go, so that none covers another or a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

# Directions of a label from its point, the usual one first, and how far it may be moved.
_DIRECTIONS = 16
_STEPS = (0.0, 3.0, 7.0, 12.0, 18.0, 25.0, 33.0, 42.0, 52.0)


class Box(NamedTuple):
    """A rectangle: left, bottom, right, top."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """The area of both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def away(self, x: float, y: float) -> float:
        """How far a point is from it; 0 inside."""
        dx = max(self.left - x, x - self.right, 0.0)
        dy = max(self.bottom - y, y - self.top, 0.0)
        return math.hypot(dx, dy)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    radius: float,
    avoided: Sequence[Box] = (),
) -> list[Box]:
    """A box for the label of each point, in the unit of the points.

    The most crowded are placed first, each where it covers the least, then where it is nearest.

    Args:
        points: where the markers are.
        sizes: width and height of each label.
        inside: what labels have to stay in.
        radius: of a marker.
        avoided: what else they had better not cover.
    """
    markers = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: dict[int, Box] = {}
    for index in sorted(range(len(points)), key=lambda i: -_neighbours(points, i)):
        others = [*markers, *avoided, *placed.values()]
        boxes = _around(points[index], sizes[index], radius)
        placed[index] = min(boxes, key=lambda box: _covered(box, others, inside))
    return [placed[index] for index in range(len(points))]


def steps(points: Sequence[tuple[float, float]], width: float = 2.0) -> list[Box]:
    """The stairs from point to point, level first, as thin boxes."""
    half, found = width / 2, []
    for (x0, y0), (x1, y1) in pairwise(points):
        found.append(Box(x0, y0 - half, x1, y0 + half))
        found.append(Box(x1 - half, y0, x1 + half, y1))
    return found


def _neighbours(points: Sequence[tuple[float, float]], index: int) -> float:
    """How crowded it is around a point."""
    return sum(1 / (10.0 + math.dist(points[index], point)) for point in points)


def _around(point: tuple[float, float], size: tuple[float, float], radius: float) -> Iterator[Box]:
    """Boxes around a point, the nearest first; among equals `min` takes the first."""
    (x, y), (width, height) = point, size
    for step in _STEPS:
        for turn in range(_DIRECTIONS):
            angle = 2 * math.pi * turn / _DIRECTIONS
            dx, dy = math.cos(angle), math.sin(angle)
            reach = radius + step
            # The edge of the box, not its middle, is that far away.
            left = x + dx * (reach + width / 2) - width / 2
            bottom = y + dy * (reach + height / 2) - height / 2
            yield Box(left, bottom, left + width, bottom + height)


def _covered(box: Box, others: Sequence[Box], inside: Box) -> float:
    outside = box.area - box.shared(inside)
    return sum(box.shared(other) for other in others) + 4 * outside
