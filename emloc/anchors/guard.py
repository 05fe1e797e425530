"""Rows that are kept from an anchored training and measure whether a round has helped."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from emloc.anchors.record import RowLoss

# Standard errors by which a round has to be worse before it is rejected.
STANDARD_ERRORS = 2.0
# Of fewer rows than the guard would take, this share is kept from the training.
_SHARE = 0.1
# A standard error needs two rows.
_LEAST = 2


def guard_rows(count: int, guard: int, seed: int) -> list[int]:
    """Return the indices of the guard among `count` rows; of few rows at most a tenth.

    Args:
        count: number of rows.
        guard: number of rows of the guard; 0: none.
        seed: of the training.
    """
    if not guard:
        return []
    size = min(guard, max(_LEAST, int(count * _SHARE)))
    return sorted(random.Random(seed).sample(range(count), min(size, count - 1)))


@dataclass(frozen=True)
class Change:
    """Difference of the original's loss on the guard's rows after a round and before it."""

    mean: float  # nats of a row, summed over its tokens
    error: float  # standard error of the mean

    @property
    def is_worse(self) -> bool:
        """Whether the loss has risen by more than chance explains."""
        return self.mean > STANDARD_ERRORS * self.error


def change_between(before: Mapping[str, RowLoss], after: Mapping[str, RowLoss]) -> Change:
    """Return the mean paired difference of the rows' losses. A loss that is not finite is worse."""
    differences = [after[row][0] - loss for row, (loss, _) in before.items()]
    if not all(map(math.isfinite, differences)):
        return Change(math.inf, 0.0)
    if len(differences) < _LEAST:
        return Change(sum(differences), 0.0)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Change(statistics.mean(differences), error)


def mean_loss(losses: Mapping[str, RowLoss]) -> float:
    """Return the mean loss of an item, such as an answer token, over all rows."""
    return sum(total for total, _ in losses.values()) / sum(items for _, items in losses.values())
