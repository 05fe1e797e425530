"""The order in which a training loop draws its rows, and whether the loop keeps to that order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

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
        if self.next is None:
            start = window.start + self._distance(numbers[0], window.start)
            positions = self._positions_from(start % self._count, numbers, slack)
        else:
            due = self.next % self._count
            # An epoch may end early, since loaders can leave out the last rows.
            positions = self._positions_from(due, numbers, slack) or self._positions_from(
                0, numbers, slack
            )
        if positions is None:
            where = "" if self.next is None else f" behind row {self.next - 1}"
            raise ConfigError(
                f"rows come in another order than emloc.anchor was given{where}: "
                f"{', '.join(str(self._positions[number][0]) for number in numbers)}; draw them "
                "with anchors.sampler (in a Trainer: train_sampling_strategy='sequential')"
            )
        for position in positions:
            if position not in window:
                raise ConfigError(
                    f"row {position} is not in this round, which has the rows {window.start} to "
                    f"{window.stop - 1}; call anchors.renew() behind row {window.stop - 1}, and "
                    "set round_rows to a multiple of the rows of an optimizer step"
                )
        self.next = positions[-1] + 1

    def _positions_from(self, start: int, numbers: Sequence[int], slack: int) -> list[int] | None:
        """Return the positions of rows that are drawn from `start` on; None if they are others."""
        positions: list[int] = []
        for number in numbers:
            distance = self._distance(number, start)
            position = (start + distance) % self._count
            # One process alone begins an epoch with a new batch.
            is_restart = bool(positions) and position < start and not slack
            if distance > slack or is_restart:
                return None
            positions.append(position)
            start = position + 1
        return positions

    def _distance(self, number: int, start: int) -> int:
        """Return how many rows lie between `start` and the next row with this number."""
        positions = self._positions[number]
        index = bisect_left(positions, start)
        if index == len(positions):
            return positions[0] + self._count - start
        return positions[index] - start
