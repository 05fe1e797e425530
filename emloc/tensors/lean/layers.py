"""A layer with its LoRA as one operation: the adapter rides on the layer's own matrix products.

Shapes: N tokens, x (N, n), y (N, m), LoRA a (r, n), b (m, r), scale s. A factorised layer u v with
its LoRA is a factorised layer of rank k + r,

    y = [u, b] [v; s a] x,

so two products do what took four, two scalings and a sum. Of a whole W the LoRA is added by the
product that forms it. PEFT goes on owning the parameters: what is saved does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rows of 16-bit numbers that start at multiples of 16 bytes are what tensor cores read at full
# speed; a few rows of zeros cost less.
ALIGN = 8


@dataclass(frozen=True)
class LoraOperands:
    """The LoRA of one layer: PEFT's parameters, and their copies in the dtype of the layer."""

    a: nn.Parameter  # (r, n)
    b: nn.Parameter  # (m, r)
    scale: float
    down: Tensor  # (r, n), s a
    up: Tensor  # (r, m), b^T


class FrozenBase(Protocol):
    """The frozen half of an adapted layer."""

    bias: Tensor | None

    def forward(self, x: Tensor, low: LoraOperands) -> tuple[Tensor, Tensor]:
        """y (N, m) with the LoRA in it, and the LoRA's hidden features s a x (N, r)."""

    def backward(
        self, dy: Tensor, low: LoraOperands, wants_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """dx (N, n) if wanted, and the gradient of the hidden features (N, r)."""


class DenseBase:
    """A weight (m, n)."""

    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None) -> None:
        self._weight = weight  # formed for the moment where it is packed
        self.bias = bias

    def forward(self, x: Tensor, low: LoraOperands) -> tuple[Tensor, Tensor]:
        """As `Base` says."""
        hidden = x.mm(low.down.t())
        y = functional.linear(x, self._weight(), self.bias)
        return y.addmm_(hidden, low.up), hidden

    def backward(
        self, dy: Tensor, low: LoraOperands, wants_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """As `Base` says."""
        hidden = dy.mm(low.up.t())
        return dy.mm(self._weight()).addmm_(hidden, low.down) if wants_dx else None, hidden


# [v; s a] (p, n) and [u, b]^T (p, m), p = k + r and some rows of zeros.
Stack = Callable[[LoraOperands], tuple[Tensor, Tensor]]


class FactorizedBase:
    """Factors v (k, n) and u^T (k, m) with the LoRA's two matrices below them."""

    def __init__(self, rank: int, matrices: Stack, bias: Tensor | None) -> None:
        self._rank, self._matrices = rank, matrices
        self.bias = bias

    def forward(self, x: Tensor, low: LoraOperands) -> tuple[Tensor, Tensor]:
        """As `Base` says."""
        down, up = self._matrices(low)
        hidden = x.mm(down.t())
        y = hidden.mm(up) if self.bias is None else torch.addmm(self.bias, hidden, up)
        return y, self._own(hidden, low)

    def backward(
        self, dy: Tensor, low: LoraOperands, wants_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """As `Base` says."""
        down, up = self._matrices(low)
        hidden = dy.mm(up.t())
        return hidden.mm(down) if wants_dx else None, self._own(hidden, low)

    def _own(self, hidden: Tensor, low: LoraOperands) -> Tensor:
        return hidden[:, self._rank : self._rank + low.down.shape[0]]


class FusedLora(torch.autograd.Function):
    """A frozen layer and its LoRA; nothing is kept for the backward pass but x and (N, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: FrozenBase, low: LoraOperands
    ) -> Tensor:
        """Map (..., n) to (..., m)."""
        flat = x.reshape(-1, x.shape[-1])
        y, hidden = base.forward(flat, low)
        ctx.save_for_backward(flat, hidden.contiguous())  # a view would keep what it is cut from
        ctx.base, ctx.low = base, low
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        (dy,) = grads
        flat, hidden = ctx.saved_tensors
        shape = (*dy.shape[:-1], flat.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        dx, dhidden = ctx.base.backward(dy, ctx.low, ctx.needs_input_grad[0])
        da = wide_product(dhidden.t(), flat, ctx.low.a.dtype)
        db = wide_product(dy.t(), hidden, ctx.low.b.dtype)
        # `hidden` holds the scale already; a's gradient does not.
        da = da if ctx.low.scale == 1 else da * ctx.low.scale
        return None if dx is None else dx.view(shape), da, db, None, None


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in `dtype`; float32 of 16-bit factors without rounding in between."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.mm(right).to(dtype)


def stack(matrix: Tensor, rank: int) -> Tensor:
    """`matrix` (k, c) on top of room for `rank` rows, in a buffer of aligned height."""
    k, columns = matrix.shape
    buffer = matrix.new_zeros(aligned(k + rank), columns)
    buffer[:k] = matrix
    return buffer


def aligned(height: int) -> int:
    """The next height at which rows lie well."""
    return -(-height // ALIGN) * ALIGN


class ScratchBuffer:
    """Room for one matrix at a time that is formed to be multiplied, as large as the largest."""

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def of(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Room for (rows, columns) in the dtype and on the device of `like`; what was there goes.

        Operations of one stream run in order, so the next layer may write where the last has read.
        """
        size = rows * columns
        room = self._room
        if room is None or room.numel() < size:
            self._room = room = like.new_empty(size)
        return room[:size].view(rows, columns)


@torch.no_grad()
def refresh(lows: Sequence[LoraOperands]) -> None:
    """Copy what the optimizer has changed into the matrices that are multiplied."""
    downs, ups = [low.down for low in lows], [low.up for low in lows]
    torch._foreach_copy_(downs, [low.a.detach() for low in lows])
    if any(low.scale != 1 for low in lows):
        torch._foreach_mul_(downs, [low.scale for low in lows])
    torch._foreach_copy_(ups, [low.b.detach().T for low in lows])
