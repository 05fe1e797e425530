"""Training objectives: the loss of a training step and the scores of held-out rows.

A new objective is one class, here or in a plug-in, and a model family that returns it. The trainer,
the pruning by gradients and the evaluation use only the methods of `Objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from emloc.data.collate import EncodedRow, group_by_length
from emloc.data.examples import Examples
from emloc.data.reader import Reader
from emloc.runtime.progress import StageProgress

# A batch from the collation of the family's reader, with training targets.
Batch = dict[str, Any]
# Function of the model, a batch and the number of items in the whole optimizer step. Returns the
# loss of this forward pass.
Loss = Callable[[Any, Batch, Tensor], Tensor]


class Answer(Protocol):
    """Scores of one held-out row."""

    @property
    def id(self) -> str:
        """Id of the row in its data set."""

    @property
    def line(self) -> dict[str, Any]:
        """The row's line in `predictions.jsonl`, with values that JSON can represent."""


class Objective(ABC):
    """A training objective: its loss, and its scores on held-out rows."""

    # Scores that `summary` always contains. The task's metric is one of them, by default the first.
    score_names: ClassVar[tuple[str, ...]]
    # Whether the model generates text. Only text can be scored by lm-eval and by a task's scorer.
    writes_text: ClassVar[bool] = False
    # Whether `row_losses` is defined.
    measures_rows: ClassVar[bool] = False

    @property
    @abstractmethod
    def key(self) -> list[Any]:
        """Cache key of loss and scores: the objective's settings as plain values."""

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """Number of items (answer tokens or rows) in the loss of this batch, a scalar.

        The trainer sums the numbers over the batches of an optimizer step and over processes.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """Run one forward pass and return the sum of its items' losses divided by `count`.

        `count` is the number of items of the whole optimizer step. The losses of the step's batches
        therefore add up to the mean over its items, even if the batches differ in size.
        """

    def plain_loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """As `loss`, without extra terms that a model adds in training (a router's load balance).

        `emulator=prune` computes the importance of parameters from this loss.
        """
        return self.loss(model, batch, count)

    def lean_loss(self, model: Any) -> Loss | None:
        """Change `model` so that its loss needs less memory, and return the function to call.

        Returns None and leaves the model unchanged if there is no such loss (setting `train.lean`).
        """
        return None

    def row_losses(self, model: Any, rows: Sequence[Any], batch: Batch) -> list[tuple[float, int]]:
        """Sum of the losses and number of items of each row of a batch, without gradients.

        Anchored training compares the original's loss before and after a round by these numbers.

        Raises:
            NotImplementedError: the objective does not measure single rows (`measures_rows`).
        """
        raise NotImplementedError

    @abstractmethod
    def answers(self, model: Any, rows: Sequence[Any], batch: Batch) -> Sequence[Answer]:
        """Score the rows of one batch; return one answer per row, in order.

        Args:
            model: the model in eval mode, with gradients off.
            rows: rows encoded by the family's reader.
            batch: the rows as a batch with training targets, on the model's device.
        """

    @abstractmethod
    def summary(self, answers: Sequence[Any], examples: Examples) -> dict[str, float]:
        """Name -> score over all answers: all of `score_names`, and scores of groups of rows."""

    @torch.inference_mode()
    def score(self, model: Any, rows: Sequence[EncodedRow], reader: Reader, size: int) -> list[Any]:
        """Score all rows in batches of `size`; return one answer per row, in the given order."""
        answers: dict[int, Answer] = {}
        with StageProgress("evaluate", len(rows), "row") as progress:
            for indices in group_by_length(rows, size):
                group = [rows[index] for index in indices]
                batch = {
                    name: value.to(model.device) for name, value in reader.collate(group).items()
                }
                answers |= dict(zip(indices, self.answers(model, group, batch), strict=True))
                progress.update(len(indices))
        return [answers[index] for index in range(len(rows))]
