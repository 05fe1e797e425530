"""Which points nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, cheapest first.

    Args:
        points: (cost, score): less of the first and more of the second is better.

    Returns:
        Those for which no other costs at most as much and scores at least as high, one of the two
        strictly. Equals stand or fall together.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    found: list[int] = []
    for index in order:
        if (
            not found
            or points[index][1] > points[found[-1]][1]
            or (points[index] == points[found[-1]])
        ):
            found.append(index)
    return found
