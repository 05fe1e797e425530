"""Order in which a training draws its rows; it is known ahead from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from emloc.config.settings import TrainSettings
from emloc.stages.training.work import rows_of_step


class RowOrder:
    """Row indices in random order, grouped by length and cut into whole optimizer steps.

    Rows that fill no whole step are left out of an epoch: processes would get uneven shares of
    them, and the Trainer would fill the shares up with rows of other steps. If all rows together
    are fewer than one step, an epoch is one smaller step.

    The order of an epoch depends only on the seed and its number. A generator that keeps its state
    between epochs would be in another state after a resume, and, with dropout, in each process.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self._lengths, self._step, self._seed = list(lengths), step, seed
        self.steps = max(len(self._lengths) // step, 1)  # of one epoch
        self.epoch_rows = min(self.steps * step, len(self._lengths))

    def epoch(self, number: int) -> list[int]:
        """Return the row indices of an epoch."""
        generator = torch.Generator()
        generator.manual_seed(self._seed + number)
        # The Trainer's DataLoader draws one number before the order. Drawing one here makes the
        # first epoch equal to the Trainer's.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order: list[int] = get_length_grouped_indices(
            self._lengths, self._step, generator=generator
        )
        return order[: self.epoch_rows]

    def of_steps(self, first: int, end: int) -> list[int]:
        """Return the row indices of the optimizer steps `first` to `end` - 1."""
        rows: list[int] = []
        size = self.epoch_rows // self.steps
        for epoch in range(first // self.steps, -(-end // self.steps)):
            start, stop = (max(0, step - epoch * self.steps) * size for step in (first, end))
            rows += self.epoch(epoch)[start:stop]
        return rows


def order_of(rows: Sequence[Any], recipe: TrainSettings, seed: int) -> RowOrder:
    """Return the order in which a training of this recipe draws some rows, encoded or keyed."""
    return RowOrder([row.length for row in rows], rows_of_step(recipe, len(rows)), seed)


class WholeSteps(Sampler[int]):
    """Sampler of one epoch at a time, `skipped` steps further on in the order than the training is.

    Steps are skipped when their rows were used by a round that was rejected.
    """

    def __init__(self, order: RowOrder, steps_done: Callable[[], int], skipped: int = 0) -> None:
        self._order, self._steps_done, self._skipped = order, steps_done, skipped

    def __len__(self) -> int:
        return self._order.epoch_rows

    def __iter__(self) -> Iterator[int]:
        # The Trainer begins an epoch here; when it resumes, it passes over the steps already done.
        epoch = self._steps_done() // self._order.steps
        first = epoch * self._order.steps + self._skipped
        return iter(self._order.of_steps(first, first + self._order.steps))
