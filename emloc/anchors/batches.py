"""Collate training rows together with their offsets, which a thread reads ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.anchors.places import Place
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
    """Collates keyed rows to a batch whose item `OFFSETS` is a future of the batch's offsets.

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
        # The masks are computed here, since the batch may move to a device meanwhile.
        masks = [place.tokens(batch) for place in self._places]
        return batch | {OFFSETS: self._thread.submit(self._read, [r.key for r in rows], masks)}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, keys: Sequence[str], masks: Sequence[Tensor]) -> BatchOffsets:
        return [
            self._padded([self._reader.read(key, place) for key in keys], mask)
            for place, mask in enumerate(masks)
        ]

    def _padded(self, rows: Sequence[Mapping[str, Tensor]], mask: Tensor) -> dict[str, Tensor]:
        """Return the parts of all rows at the positions (B, L) of their tokens."""
        return {
            name: _scatter([row[name] for row in rows], mask, pinned=self._pinned)
            for name in rows[0]
        }


def _scatter(rows: Sequence[Tensor], mask: Tensor, *, pinned: bool) -> Tensor:
    """Return (B, L, ...) with the tokens of each row where the mask (B, L) is true, and zeros."""
    first = rows[0]
    padded = torch.zeros(*mask.shape, *first.shape[1:], dtype=first.dtype, pin_memory=pinned)
    for index, tokens in enumerate(rows):
        padded[index, mask[index]] = tokens
    return padded


def take_offsets(batch: dict[str, Any], device: torch.device) -> BatchOffsets:
    """Remove the offsets from a batch and return them on the device.

    Raises:
        ConfigError: a row has no offsets.
    """
    future: Future[BatchOffsets] = batch.pop(OFFSETS)
    return [
        {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        for parts in future.result()
    ]
