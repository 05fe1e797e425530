"""What the tensors in a checkpoint's files hold: one parameter each, or the rows of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSlice:
    """The rows of a stored tensor that belong to one parameter.

    The rows are `blocks` equal blocks of `shares` equal shares each; shares `start` to `stop` of
    every block are the parameter's, in the order they lie in. One block of three shares: queries,
    keys and values one after the other. A block per key/value head: its query heads, then its keys,
    then its values.
    """

    blocks: int
    shares: int
    start: int
    stop: int

    def rows(self, total: int) -> list[slice]:
        """Where the parameter's rows lie among `total`, one run of them per block.

        Raises:
            ValueError: the rows are no such blocks.
        """
        share, rest = divmod(total, self.blocks * self.shares)
        if rest:
            raise ValueError(f"{total} rows are not {self.blocks} x {self.shares} equal shares")
        begins = range(0, total, share * self.shares)
        return [slice(at + self.start * share, at + self.stop * share) for at in begins]

    def of(self, stored: Any, total: int) -> Tensor:
        """The parameter out of `stored`, a tensor or a file's slice of `total` rows.

        Raises:
            ValueError: see `rows`.
        """
        pieces: list[Tensor] = [stored[rows] for rows in self.rows(total)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, stored: Tensor, tensor: Tensor) -> None:
        """Write the parameter `tensor` into its rows of `stored` (rows, ...)."""
        runs = self.rows(len(stored))
        for rows, piece in zip(runs, tensor.chunk(len(runs)), strict=True):
            stored[rows] = piece


# The name of a tensor in the files -> the parameters it holds; None where it is the whole of one.
Layout = Callable[[str], Mapping[str, TensorSlice | None]]
