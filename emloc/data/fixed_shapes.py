"""Pad batches to a few fixed shapes, so that the operations of a training step repeat exactly.

A shape has a number of positions, and a number of answer tokens. Answer tokens are given by indices
instead of by labels at all positions, since a GPU counts labels only while the host waits.

Padding lies behind the text where attention is causal: no token sees what is behind it, so there is
no mask, and attention takes its fastest way. Other models get padding in front, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emloc.data.collate import IGNORE
from emloc.data.lengths import best_lengths, padded_to
from emloc.data.pending import changed_batch

# Names in a batch: for each answer token, the index of the position that predicts it in the flat
# batch, and its id; IGNORE for tokens that only fill the shape up. Both (M,).
PREDICTING, ANSWERS = "predicting_positions", "answer_tokens"
# Name in a batch without a mask: at which positions there is a token of a row, (B, L) bool.
REAL_TOKENS = "real_tokens"
# Shapes of one training.
MOST_SHAPES = 8
# Batches that a shape needs for a graph to be worth it: one costs the time of two or three batches.
LEAST_BATCHES = 4

Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch besides its number of rows."""

    length: int  # positions of a row
    answers: int  # answer tokens of all rows


@dataclass(frozen=True)
class FixedShapes:
    """The shapes of the batches of a training, ascending by their length."""

    shapes: tuple[BatchShape, ...]
    examples: tuple[tuple[int, ...], ...]  # for each frequent shape, row indices of such a batch
    padding: float  # share of the positions that batches are padded by
    masked: bool  # whether batches have a mask and padding in front; else padding lies behind

    def of(self, length: int) -> BatchShape:
        """Return the shape of a batch whose longest row has `length` positions."""
        lengths = [shape.length for shape in self.shapes]
        return self.shapes[lengths.index(padded_to(length, lengths))]

    def collate(self, rows: Sequence[Any], collate: Collate) -> dict[str, Any]:
        """Collate the rows of one of the batches to its shape."""
        batch = collate(list(rows))
        shape = self.of(batch["input_ids"].shape[1])
        return with_shape(batch, shape, masked=self.masked)


def fixed_shapes(
    rows: Sequence[Any], batches: Sequence[Sequence[int]], examples: range, *, masked: bool
) -> FixedShapes:
    """Return the shapes for the batches of a training.

    Args:
        rows: encoded rows of text, with `length` and `answer_start`.
        batches: the row indices of all batches.
        examples: indices of the batches that are computed now; frequent shapes have
            `LEAST_BATCHES` of them.
        masked: whether the model needs a mask.
    """
    longest = [max(rows[index].length for index in batch) for batch in batches]
    lengths = best_lengths(longest, MOST_SHAPES)
    groups: dict[int, list[int]] = {length: [] for length in lengths}
    for number, length in enumerate(longest):
        groups[padded_to(length, lengths)].append(number)
    now = [[number for number in numbers if number in examples] for numbers in groups.values()]
    return FixedShapes(
        tuple(
            _shape(length, [[rows[index] for index in batches[number]] for number in numbers])
            for length, numbers in groups.items()
        ),
        tuple(tuple(batches[some[0]]) for some in now if len(some) >= LEAST_BATCHES),
        sum(length * len(numbers) for length, numbers in groups.items()) / sum(longest) - 1,
        masked,
    )


def _shape(length: int, batches: list[list[Any]]) -> BatchShape:
    """Return the shape of batches of rows that are padded to a length."""
    answers = [sum(row.length - max(row.answer_start, 1) for row in batch) for batch in batches]
    return BatchShape(length, max(answers))


def with_shape(batch: dict[str, Any], shape: BatchShape, *, masked: bool) -> dict[str, Any]:
    """Return a collated batch of text, padded to a shape, with indices of its answers.

    With `masked` more padding is put in front of the rows. Else all padding lies behind them, and
    the batch has `REAL_TOKENS` instead of mask and positions, which models then take for granted.
    """
    size = batch["input_ids"].shape
    left_out = {"labels", "logits_to_keep"}
    front, behind = (shape.length - size[1], 0) if masked else (0, shape.length - size[1])
    # How far each row moves to the front, and where its tokens come from.
    moved = torch.zeros(size[0], dtype=torch.long)
    if not masked:
        left_out |= {"attention_mask", "position_ids"}
        moved = (batch["attention_mask"] == 0).sum(1)
    source = (torch.arange(size[1]) + moved[:, None]) % size[1]

    def padded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move and pad what has one value for each token, as ids, mask and token types."""
        return {
            name: functional.pad(value.gather(1, source), (front, behind))
            if value.shape == size
            else value
            for name, value in tensors.items()
            if name not in left_out
        }

    new = changed_batch(batch, padded) | _answers(batch["labels"], shape, size[1] + front - moved)
    if not masked:
        new |= {REAL_TOKENS: torch.arange(shape.length) < (size[1] - moved)[:, None]}
    return new


def _answers(labels: Tensor, shape: BatchShape, ends: Tensor) -> dict[str, Tensor]:
    """Return `PREDICTING` and `ANSWERS` for labels (B, K) of the last K tokens of each row.

    `ends` (B,): the position behind the last token of each row in the batch of the shape.
    """
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    positions = rows * shape.length + columns + (ends - labels.shape[1])[rows]
    spare = (0, shape.answers - len(rows))
    return {
        PREDICTING: functional.pad(positions, spare),
        ANSWERS: functional.pad(labels[rows, columns + 1], spare, value=IGNORE),
    }


def answer_count(batch: Mapping[str, Any]) -> Tensor:
    """Return the number of answer tokens of a batch of a fixed shape, a scalar."""
    return torch.as_tensor((batch[ANSWERS] != IGNORE).sum())


def predicting_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return at which positions of a batch of a fixed shape an answer is predicted, (B, L)."""
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool).flatten()
    mask[batch[PREDICTING][batch[ANSWERS] != IGNORE]] = True
    return mask.view_as(batch["input_ids"])
