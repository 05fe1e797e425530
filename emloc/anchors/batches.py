"""Collate training rows together with their offsets, which a thread reads ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.anchors.places import Place
from emloc.anchors.positions import Positions
from emloc.anchors.shards import OffsetReader

# Name of the offsets in a batch.
OFFSETS = "anchor_offsets"

# For each place: name of a part -> tensor (B, L, ...); 0 at positions without an offset.
BatchOffsets = list[dict[str, Tensor]]


@dataclass(frozen=True)
class KeyedRow:
    """A training row with the key of its offsets."""

    row: Any  # encoded by the reader of the model family
    key: str

    @property
    def length(self) -> int:
        """Number of tokens."""
        length: int = self.row.length
        return length


class AnchoredCollator:
    """Collates keyed rows to a batch whose item `OFFSETS` is a future of the rows' offsets.

    One thread reads the offsets while the device computes the batch before: the loader of the
    Trainer collates each batch one step ahead.
    """

    def __init__(
        self,
        collate_rows: Callable[[list[Any]], dict[str, Any]],
        reader: OffsetReader,
        places: Sequence[Place],
        *,
        pinned: bool,
    ) -> None:
        self._collate, self._reader, self._places = collate_rows, reader, places
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offsets")

    def __call__(self, rows: Sequence[KeyedRow]) -> dict[str, Any]:
        """Return the batch of the rows; its offsets are being read."""
        batch = self._collate([keyed.row for keyed in rows])
        # The positions are computed here, since the batch may move to a device meanwhile.
        positions = [Positions.of(place.tokens(batch)) for place in self._places]
        return batch | {OFFSETS: self._thread.submit(self._read, [r.key for r in rows], positions)}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, keys: Sequence[str], positions: Sequence[Positions]) -> list[TokenOffsets]:
        return [
            TokenOffsets(read_tokens(self._reader, keys, place, pinned=self._pinned), some)
            for place, some in enumerate(positions)
        ]


def take_offsets(batch: dict[str, Any], device: torch.device) -> BatchOffsets:
    """Remove the offsets from a batch and return them on the device.

    Raises:
        ConfigError: a row has no offsets.
    """
    future: Future[list[TokenOffsets]] = batch.pop(OFFSETS)
    return [offsets.padded(device) for offsets in future.result()]


@dataclass(frozen=True)
class TokenOffsets:
    """The offsets of a batch at one place, without padding, and the positions of their tokens."""

    parts: Mapping[str, Tensor]  # (tokens, ...), row after row
    positions: Positions  # of the tokens

    def padded(self, device: torch.device) -> dict[str, Tensor]:
        """Return the parts (B, L, ...) on the device, with zeros at all other positions."""
        return {
            name: self.positions.padded(part.to(device, non_blocking=True))
            for name, part in self.parts.items()
        }


def read_tokens(
    reader: OffsetReader, keys: Sequence[str], place: int, *, pinned: bool
) -> dict[str, Tensor]:
    """Return the parts of the offsets of some rows at a place, (tokens, ...), row after row.

    `pinned`: in pinned memory, from which a copy to a GPU does not wait.
    """
    rows = [reader.read(key, place) for key in keys]
    return {name: _joined([row[name] for row in rows], pinned=pinned) for name in rows[0]}


def _joined(rows: list[Tensor], *, pinned: bool) -> Tensor:
    """Return the tensors (tokens, ...) of some rows in one tensor, copied once."""
    shape = (sum(map(len, rows)), *rows[0].shape[1:])
    return torch.cat(rows, out=torch.empty(shape, dtype=rows[0].dtype, pin_memory=pinned))
