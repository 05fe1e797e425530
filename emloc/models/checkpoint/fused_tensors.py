"""Fused tensors: a stored tensor that holds the rows of several parameters, such as `qkv`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSlice:
    """The rows of a stored tensor that belong to one parameter.

    The stored rows form `blocks` equal blocks, and each block has `shares` equal shares. The
    parameter's rows are the shares from `start` up to, but without, `stop` of every block. Two
    layouts are in use. One block with three shares: queries, keys, values. One block per key/value
    head: the query heads of its group, then its keys, then its values.
    """

    blocks: int
    shares: int
    start: int
    stop: int

    def rows(self, total: int) -> list[slice]:
        """Slices of the parameter's rows in a tensor with `total` rows, one slice per block.

        Raises:
            ValueError: `total` is not divisible into the blocks and shares.
        """
        share, rest = divmod(total, self.blocks * self.shares)
        if rest:
            raise ValueError(f"{total} rows are not {self.blocks} x {self.shares} equal shares")
        block_starts = range(0, total, share * self.shares)
        return [slice(row + self.start * share, row + self.stop * share) for row in block_starts]

    def extract(self, stored: Any, total: int) -> Tensor:
        """Read the parameter from `stored`, a tensor or a safetensors slice with `total` rows.

        Raises:
            ValueError: `total` is not divisible into the blocks and shares.
        """
        pieces: list[Tensor] = [stored[rows] for rows in self.rows(total)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def insert(self, stored: Tensor, tensor: Tensor) -> None:
        """Write the parameter `tensor` into its rows of `stored` (rows, ...)."""
        slices = self.rows(len(stored))
        for rows, piece in zip(slices, tensor.chunk(len(slices)), strict=True):
            stored[rows] = piece
