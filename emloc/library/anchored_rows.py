"""Rows of a user's own loop: their keys, and the collation that says which rows a batch holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emloc.anchors.batches import KeyedRow
from emloc.errors import ConfigError, one_line
from emloc.library.arguments import require_batch
from emloc.library.row_content import content_digest

# Makes a batch of some rows, as `DataLoader` and `Trainer` call it.
Collate = Callable[[list[Any]], Any]

# Name of the batch's item that says which rows it holds. The emulator takes it out of the call.
ROWS = "anchored_rows"
# Number of a row that is not among the anchored ones.
UNKNOWN = -1


class BatchRows:
    """Which rows a batch holds, and where their tokens are.

    It is no tensor, so nothing moves it to a device. The hooks read it without waiting for one.
    Loops that move all items of a batch call `to`, which returns the object itself.
    """

    def __init__(self, owner: str, numbers: list[int], mask: Tensor) -> None:
        self.owner = owner  # id of the anchors that made the batch
        self.numbers = numbers
        self.mask = mask  # (B, L) bool, false for padding

    def to(self, *_: Any, **__: Any) -> BatchRows:
        """Return the object itself."""
        return self

    cuda = cpu = pin_memory = to


class AnchoredCollate:
    """Collates rows as the user's own function does, and adds which rows they are.

    Rows that are not anchored, such as those of an evaluation, may come too.
    """

    def __init__(self, owner: str, table: RowTable) -> None:
        self.is_closed = False
        self._owner, self._collate, self._numbers = owner, table.collate, table.numbers
        self._lengths = [keyed.length for keyed in table.distinct]

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch of the rows.

        Raises:
            ConfigError: the anchors are closed, or the batch is none of these rows.
        """
        if self.is_closed:
            raise ConfigError(
                "these anchors are closed; call emloc.anchor again, or collate with your own "
                "function to train without anchors"
            )
        batch = collated(self._collate, rows)
        numbers = [self._numbers.get(content_digest(row), UNKNOWN) for row in rows]
        mask = token_mask(batch)
        if len(mask) != len(rows):
            raise ConfigError(
                f"collate makes {len(mask)} sequences of {len(rows)} rows; pass one that makes one "
                "sequence of each row (no packing)"
            )
        for number, length in zip(numbers, mask.sum(-1).tolist(), strict=True):
            if number != UNKNOWN and length != self._lengths[number]:
                raise ConfigError(
                    f"collate makes {length} tokens of a row that has {self._lengths[number]} "
                    "alone; pass one that changes no row by its neighbours"
                )
        batch[ROWS] = BatchRows(self._owner, numbers, mask)
        return batch


def collated(collate: Collate, rows: Sequence[Any]) -> Any:
    """Return the batch of some rows.

    Some collators of transformers write into the rows, so they get copies.

    Raises:
        ConfigError: the batch is no dictionary.
    """
    batch = collate([copy.copy(row) for row in rows])
    if not isinstance(batch, Mapping):
        raise ConfigError(
            "collate must return a dictionary of arguments of the model, such as input_ids; got "
            f"{type(batch).__name__}"
        )
    return batch


def token_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return which positions of a batch hold tokens, (B, L) bool; without a mask all of them.

    Raises:
        ConfigError: the batch has no tokens.
    """
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.bool()
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ConfigError(
            "collate must return tensors input_ids and attention_mask of the shape (rows, tokens); "
            f"got {', '.join(batch) or 'an empty batch'}"
        )
    return torch.ones_like(ids, dtype=torch.bool)


@dataclass(frozen=True)
class TableRow:
    """Where a row is in the user's data set."""

    index: int
    length: int  # tokens


@dataclass(frozen=True)
class RowTable:
    """The rows of a loop in the order in which they are drawn; each content is there once."""

    rows: Any  # the user's list or data set
    collate: Collate
    distinct: list[KeyedRow]  # of `TableRow`
    order: list[int]  # position -> index in `distinct`
    numbers: dict[str, int]  # digest of a row -> index in `distinct`

    def of(self, positions: range) -> list[KeyedRow]:
        """Return the rows at some positions, each once."""
        keyed = (self.distinct[self.order[position]] for position in positions)
        return list({row.key: row for row in keyed}.values())

    def batch(self, rows: Sequence[TableRow]) -> dict[str, Any]:
        """Return a batch of rows, which always has an attention mask."""
        batch = dict(collated(self.collate, [self.rows[row.index] for row in rows]))
        return batch | {"attention_mask": token_mask(batch).long()}


def read_rows(rows: Any, collate: Collate, model: nn.Module) -> RowTable:
    """Read all rows once, and return them with the keys and lengths that `collate` gives them.

    Raises:
        ConfigError: `rows` has no length, is empty, one of the rows is no argument of the model, or
            rows cannot be in one batch.
    """
    if isinstance(rows, Mapping | str) or not isinstance(rows, Sized):
        raise ConfigError(
            f"rows must be a list or a data set with a length, got {type(rows).__name__}; pass the "
            "rows that the loop draws, in their order"
        )
    if not len(rows) or not hasattr(rows, "__getitem__"):
        raise ConfigError("rows is empty; pass the rows that the loop draws, in their order")
    table = RowTable(rows, collate, [], [], {})
    for index in range(len(rows)):
        row = rows[index]
        number = table.numbers.setdefault(content_digest(row), len(table.distinct))
        table.order.append(number)
        if number == len(table.distinct):
            table.distinct.append(_keyed(row, index, collate, model))
    _require_padding(table)
    return table


def _require_padding(table: RowTable) -> None:
    """Check that the shortest and the longest row can be in one batch.

    Raises:
        ConfigError: they cannot, or the batch changes one of them.
    """
    by_length = sorted((keyed.row for keyed in table.distinct), key=lambda row: row.length)
    ends = [table.rows[by_length[0].index], table.rows[by_length[-1].index]]
    try:
        AnchoredCollate("", table)(ends)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"collate makes no batch of rows with {by_length[0].length} and {by_length[-1].length} "
            f"tokens ({one_line(error, 60)}); pass one that pads them, such as transformers' "
            "DataCollatorForSeq2Seq(tokenizer)"
        ) from error


def _keyed(row: Any, index: int, collate: Collate, model: nn.Module) -> KeyedRow:
    """Return a row with a key of all that the model reads of it."""
    batch = collated(collate, [row])
    require_batch(batch, f"collate([rows[{index}]])", model)
    length = int(token_mask(batch).sum())
    return KeyedRow(TableRow(index, length), content_digest(dict(batch)))
