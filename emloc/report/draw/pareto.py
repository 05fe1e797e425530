"""The Pareto front of a set of points."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front, cheapest first.

    A point is on the front if no other point costs at most as much and scores at least as high,
    with one of the two strictly better. Equal points are either all on the front or none.

    Args:
        points: (cost, score) of each. A low cost and a high score are better.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    indices: list[int] = []
    for index in order:
        last = points[indices[-1]] if indices else None
        if last is None or points[index][1] > last[1] or points[index] == last:
            indices.append(index)
    return indices
