"""Rows in groups of similar length, and tokens of several rows as one batch for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from emloc.data.prompts import EncodedExample

IGNORE = -100


class EncodedRow(Protocol):
    """An example as the reader of a model family encodes it, whatever it is made of."""

    @property
    def id(self) -> str:
        """Its name in its data set."""

    @property
    def length(self) -> int:
        """What it counts in a batch: tokens, patches; 1 where all rows are alike."""


def collate(
    batch: Sequence[EncodedExample], pad: int, *, answers_only: bool = True
) -> dict[str, Tensor]:
    """A batch, padded on the left so that answers end together.

    With `answers_only`, logits are asked for from the first answer token of the batch on: the
    vocabulary is most of a small model's arithmetic and the largest tensor of any.

    Returns:
        input_ids, attention_mask, position_ids (batch, length); with `answers_only` also labels
        (batch, kept) and logits_to_keep.
    """
    length = max(one.length for one in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE)
    for row, one in enumerate(batch):
        start = length - one.length
        ids[row, start:] = torch.tensor(one.input_ids)
        mask[row, start:] = 1
        # Nothing predicts the first token of a text, padding least of all.
        learnt = start + max(one.answer_start, 1)
        labels[row, learnt:] = ids[row, learnt:]
    result: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    if answers_only:
        # One position before the first answer token predicts it.
        kept = max(one.length - one.answer_start for one in batch) + 1
        # As indices: a slice would stay a view, and multiplying that copies the vocabulary's
        # matrix once per row.
        result |= {"labels": labels[:, -kept:], "logits_to_keep": torch.arange(length)[-kept:]}
    return result


def by_length(rows: Sequence[EncodedRow], size: int) -> list[list[int]]:
    """Indices in groups of `size`, similar lengths together, which waste the least on padding."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    return [order[start : start + size] for start in range(0, len(order), size)]
