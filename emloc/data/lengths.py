"""Choose a few lengths that batches are padded to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Return at most `most` lengths, ascending, for which padding is least.

    Each of the given lengths is padded to the next one that is chosen. The choice is the exact
    optimum, by dynamic programming over the different lengths.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    if len(values) <= most:
        return [int(value) for value in values]
    # padding[i, j]: of the lengths i to j - 1 if they are padded to the last of them.
    number = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * values)])
    ends = np.concatenate([[0], values])
    padding = ends * (number - number[:, None]) - (tokens - tokens[:, None])
    padding = np.where(np.tri(len(ends), k=-1, dtype=bool), np.iinfo(np.int64).max // 2, padding)
    least, choices = padding[0], []
    for _ in range(most - 1):
        total = least[:, None] + padding
        choices.append(total.argmin(0))
        least = total.min(0)
    best, end = [], len(values)
    for choice in reversed(choices):
        best.append(int(ends[end]))
        end = int(choice[end])
    return sorted({*best, int(ends[end])} - {0})


def padded_to(length: int, lengths: Sequence[int]) -> int:
    """Return the least of some ascending lengths that is not below `length`."""
    return next(one for one in lengths if one >= length)
