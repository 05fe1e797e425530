"""Positions of a batch, such as those of its real tokens, and the hidden states at them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Some of the positions of a batch of B rows and L positions.

    They are kept as indices. With a boolean mask on a GPU the host would wait for the number of
    positions.
    """

    shape: torch.Size  # (B, L)
    index: Tensor  # (N,) of the positions in the flat batch, row after row, in host memory
    counts: list[int]  # for each row, how many of its positions they are

    @classmethod
    def of(cls, mask: Tensor) -> Positions:
        """Return the positions where a mask (B, L) in host memory is true."""
        return cls(mask.shape, mask.flatten().nonzero().squeeze(1), mask.sum(-1).tolist())

    def select(self, hidden: Tensor) -> Tensor:
        """Return the values (N, ...) of a tensor (B, L, ...) at the positions."""
        return hidden.flatten(0, 1).index_select(0, self._on(hidden.device))

    def put(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Return a copy of a tensor (B, L, ...) that has `values` (N, ...) at the positions."""
        return hidden.flatten(0, 1).index_copy(0, self._on(hidden.device), values).view_as(hidden)

    def padded(self, values: Tensor) -> Tensor:
        """Return values (N, ...) as a tensor (B, L, ...) with zeros at all other positions."""
        zeros = values.new_zeros(self.shape.numel(), *values.shape[1:])
        padded = zeros.index_copy_(0, self._on(values.device), values)
        return padded.view(*self.shape, *values.shape[1:])

    def _on(self, device: torch.device) -> Tensor:
        return self.index.to(device, non_blocking=True)
