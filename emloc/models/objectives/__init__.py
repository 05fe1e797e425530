"""What a model family learns: the loss of a step, and the scores of held-out rows.

A new objective is one class here or in a plug-in, named by the model family that learns it. The
trainer, the pruning by gradients and the evaluation ask for nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from emloc.data.collate import EncodedRow, by_length
from emloc.data.examples import Examples
from emloc.data.reader import Reader
from emloc.runtime.progress import StageProgress

# A batch as the family's reader collates it, targets included.
Batch = dict[str, Any]
# Model, batch and the number of items in the whole optimizer step -> the loss of this pass.
Loss = Callable[[Any, Batch, Tensor], Tensor]


class Answer(Protocol):
    """What one held-out row scored."""

    @property
    def id(self) -> str:
        """The row's name in its data set."""

    @property
    def line(self) -> dict[str, Any]:
        """Its line in `predictions.jsonl`; JSON can name every value."""


class Objective(ABC):
    """One kind of target, with its loss and its scores."""

    # Every score that `summary` always gives; a task's metric is one of them. The first is usual.
    score_names: ClassVar[tuple[str, ...]]
    # Whether the model writes its answer as text, which lm-eval and a task's own scorer can read.
    writes_text: ClassVar[bool] = False

    @property
    @abstractmethod
    def key(self) -> list[Any]:
        """What a stage that computes the loss or the scores depends on: plain values."""

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """How many items (answer tokens, rows) the loss of this batch sums over, a scalar.

        The trainer adds them up over the passes of an optimizer step and over processes.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """One forward pass: the sum of its items' losses divided by `count`, a scalar.

        Divided by the items of the whole step, the passes of a step add up to a mean, however many
        they are and however unevenly the items lie in them.
        """

    def plain_loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """The same without further terms that a model adds in training, as a router's balance.

        By it parts of a model are weighed (`emulator=prune`).
        """
        return self.loss(model, batch, count)

    def lean_loss(self, model: Any) -> Loss | None:
        """Change `model` so that its loss takes less memory, and give the loss that goes with it.

        None, with the model unchanged, where `loss` is all there is.
        """
        return None

    @abstractmethod
    def answers(self, model: Any, rows: Sequence[Any], batch: Batch) -> Sequence[Answer]:
        """What each row scores, in order.

        Args:
            model: in eval mode; gradients are off.
            rows: as the family's reader encodes them.
            batch: of these rows, targets included, on the model's device.
        """

    @abstractmethod
    def summary(self, answers: Sequence[Any], examples: Examples) -> dict[str, float]:
        """The scores of all answers: those in `score_names`, and others of kinds of rows."""

    @torch.inference_mode()
    def score(self, model: Any, rows: Sequence[EncodedRow], reader: Reader, size: int) -> list[Any]:
        """The answer to every row, in the given order, `size` rows a forward pass."""
        scored: dict[int, Answer] = {}
        with StageProgress("evaluate", len(rows), "row") as progress:
            for group in by_length(rows, size):
                some = [rows[index] for index in group]
                made = reader.collate(some)
                batch = {name: value.to(model.device) for name, value in made.items()}
                scored |= dict(zip(group, self.answers(model, some, batch), strict=True))
                progress.update(len(group))
        return [scored[index] for index in range(len(rows))]
