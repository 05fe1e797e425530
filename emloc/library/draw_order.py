"""The order in which a training loop draws its rows, and whether the loop keeps to that order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial

from torch.utils.data import Sampler

from emloc.errors import ConfigError


class FixedOrder(Sampler[int]):
    """Draws the rows as they lie, in each epoch."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def __len__(self) -> int:
        return self._count


class DrawOrder:
    """Follows the rows that a loop draws. A row has a number, and equal rows have the same.

    Attributes:
        next: position behind the row that was drawn last; None before the first one.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.next: int | None = None
        self._count = len(numbers)
        self._positions: dict[int, list[int]] = {}
        for position, number in enumerate(numbers):
            self._positions.setdefault(number, []).append(position)

    def advance(self, numbers: Sequence[int], window: range, slack: int) -> None:
        """Move behind the rows of one batch.

        Args:
            numbers: of the rows, in the order in which they were drawn.
            window: positions of the present round. The first batch of all may begin anywhere in it.
            slack: rows in front of each one that other processes may have drawn.

        Raises:
            ConfigError: a row comes too early or too late, or is in another round.
        """
        due = self.next
        for index, number in enumerate(numbers):
            start = window.start if due is None else due % self._count
            # An epoch may end early, since loaders can leave out the last rows.
            starts = (start, 0) if index == 0 else (start,)
            start = min(starts, key=partial(self._distance, number))
            distance = self._distance(number, start)
            if due is not None and distance > slack:
                raise ConfigError(
                    "rows come in another order than emloc.anchor was given: row "
                    f"{self._positions[number][0]} where row {due % self._count} is due; draw them "
                    "with anchors.sampler (in a Trainer: train_sampling_strategy='sequential')"
                )
            position = (start + distance) % self._count
            if position not in window:
                raise ConfigError(
                    f"row {position} is not in this round, which has the rows {window.start} to "
                    f"{window.stop - 1}; call anchors.renew() behind row {window.stop - 1}, and "
                    "set round_rows to a multiple of the rows of an optimizer step"
                )
            due = position + 1
        self.next = due

    def _distance(self, number: int, start: int) -> int:
        """Return how many rows lie between `start` and the next row with this number."""
        positions = self._positions[number]
        index = bisect_left(positions, start)
        if index == len(positions):
            return positions[0] + self._count - start
        return positions[index] - start
