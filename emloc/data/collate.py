"""Group rows by length, and collate the tokens of several rows to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from emloc.data.prompts import EncodedExample

# Label of positions that the loss ignores, as in torch and transformers.
IGNORE = -100


class EncodedRow(Protocol):
    """An example encoded by the reader of a model family."""

    @property
    def id(self) -> str:
        """Id of the example in its data set."""

    @property
    def length(self) -> int:
        """Size of the row in a batch, in tokens or patches; 1 if all rows have the same size."""


def collate(
    batch: Sequence[EncodedExample], pad: int, *, answers_only: bool = True
) -> dict[str, Tensor]:
    """Collate rows to a batch, with padding on the left, so that all answers end at one position.

    With `answers_only`, the batch tells the model to compute logits only for the last positions,
    from the first answer token of the batch on. In a small model the logits need most of the
    computation, and in any model they are the largest tensor.

    Args:
        batch: encoded rows.
        pad: id of the padding token.
        answers_only: add labels and restrict the logits.

    Returns:
        input_ids, attention_mask, position_ids (batch, length). With `answers_only` also labels
        (batch, kept positions) and logits_to_keep, the indices of these positions.
    """
    length = max(row.length for row in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE)
    for index, row in enumerate(batch):
        start = length - row.length
        ids[index, start:] = torch.tensor(row.input_ids)
        mask[index, start:] = 1
        # The first token of a text gets no label, because there is no token before to predict it.
        first_label = start + max(row.answer_start, 1)
        labels[index, first_label:] = ids[index, first_label:]
    result: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    if answers_only:
        # One more position, because the model predicts the first answer token at the one before.
        positions = max(row.length - row.answer_start for row in batch) + 1
        # Indices, since for a number the model would slice its hidden states. The product of this
        # view with the head would copy the head's weight once per row.
        result |= {
            "labels": labels[:, -positions:],
            "logits_to_keep": torch.arange(length)[-positions:],
        }
    return result


def group_by_length(rows: Sequence[EncodedRow], size: int) -> list[list[int]]:
    """Indices of the rows in groups of `size` with similar lengths, which need little padding."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    return [order[start : start + size] for start in range(0, len(order), size)]
