"""A frozen linear layer and its LoRA as one autograd function with fewer matrix products.

Shapes: N tokens, x (N, n), y (N, m), LoRA a (r, n), b (m, r), scale s. A factorised layer u v with
its LoRA is a factorised layer of rank k + r,

    y = [u, b] [v; s a] x,

so two matrix products replace four products, two scalings and a sum. For a dense weight W, the
LoRA's output is accumulated onto W x in place. PEFT keeps owning the parameters a and b, so saved
adapters do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# Tensor cores read 16-bit rows at full speed if they start at multiples of 16 bytes (8 numbers).
# Padding with a few rows of zeros costs less than reading unaligned rows.
ALIGN = 8


@dataclass(frozen=True)
class LoraOperands:
    """The LoRA of one layer: PEFT's parameters, and copies of them in the dtype of the layer."""

    a: nn.Parameter  # (r, n)
    b: nn.Parameter  # (m, r)
    scale: float
    down: Tensor  # (r, n), s a
    up: Tensor  # (r, m), b^T


class FrozenBase(Protocol):
    """The frozen layer under a LoRA, which computes its own output and the LoRA's together."""

    bias: Tensor | None

    def forward(self, x: Tensor, lora: LoraOperands) -> tuple[Tensor, Tensor]:
        """Return the output y (N, m) with the LoRA, and the LoRA's hidden features s a x (N, r)."""

    def backward(
        self, dy: Tensor, lora: LoraOperands, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x (N, n), or None unless `needs_dx`, and of the LoRA's hidden
        features (N, r).
        """


class DenseBase:
    """A frozen layer with a weight (m, n)."""

    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None) -> None:
        self._weight = weight  # a function, so that a packed weight is dequantised per product
        self.bias = bias

    def forward(self, x: Tensor, lora: LoraOperands) -> tuple[Tensor, Tensor]:
        """Compute W x + bias and add the LoRA's output in place; see `FrozenBase.forward`."""
        hidden = x.mm(lora.down.t())
        y = functional.linear(x, self._weight(), self.bias)
        return y.addmm_(hidden, lora.up), hidden

    def backward(
        self, dy: Tensor, lora: LoraOperands, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Compute dx from W and the LoRA, and the hidden gradient; see `FrozenBase.backward`."""
        hidden = dy.mm(lora.up.t())
        return dy.mm(self._weight()).addmm_(hidden, lora.down) if needs_dx else None, hidden


# Returns the stacked matrices [v; s a] (p, n) and [u, b]^T (p, m); p is k + r, padded with rows of
# zeros to a multiple of ALIGN.
StackedFactors = Callable[[LoraOperands], tuple[Tensor, Tensor]]


class FactorizedBase:
    """A frozen layer of rank k, whose factors v (k, n) and u^T (k, m) have the LoRA's rows below.

    Args:
        rank: k.
        stacked: returns both stacked matrices.
        bias: (m,), or None.
    """

    def __init__(self, rank: int, stacked: StackedFactors, bias: Tensor | None) -> None:
        self._rank, self._stacked = rank, stacked
        self.bias = bias

    def forward(self, x: Tensor, lora: LoraOperands) -> tuple[Tensor, Tensor]:
        """Multiply x by both stacked matrices; see `FrozenBase.forward`."""
        down, up = self._stacked(lora)
        hidden = x.mm(down.t())
        y = hidden.mm(up) if self.bias is None else torch.addmm(self.bias, hidden, up)
        return y, self._lora_columns(hidden, lora)

    def backward(
        self, dy: Tensor, lora: LoraOperands, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Multiply dy by both stacked matrices, transposed; see `FrozenBase.backward`."""
        down, up = self._stacked(lora)
        hidden = dy.mm(up.t())
        return hidden.mm(down) if needs_dx else None, self._lora_columns(hidden, lora)

    def _lora_columns(self, hidden: Tensor, lora: LoraOperands) -> Tensor:
        """The LoRA's columns (N, r) of the hidden features (N, p) of base and LoRA."""
        return hidden[:, self._rank : self._rank + lora.down.shape[0]]


class FusedLora(torch.autograd.Function):
    """A frozen layer and its LoRA as one function of x.

    It saves only x and the LoRA's hidden features (N, r) for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: FrozenBase, lora: LoraOperands
    ) -> Tensor:
        """Output (..., m) of the layer with its LoRA for x (..., n)."""
        flat = x.reshape(-1, x.shape[-1])
        y, hidden = base.forward(flat, lora)
        # Contiguous, because saving a view would keep the whole tensor behind it in memory.
        ctx.save_for_backward(flat, hidden.contiguous())
        ctx.base, ctx.lora = base, lora
        # Not a view of y: some models, such as Falcon, add to the output in place, and autograd
        # forbids that for a view which a custom function returns.
        output: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; None for the base and the operands."""
        (dy,) = grads
        flat, hidden = ctx.saved_tensors
        shape = (*dy.shape[:-1], flat.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        dx, dhidden = ctx.base.backward(dy, ctx.lora, ctx.needs_input_grad[0])
        da = wide_product(dhidden.t(), flat, ctx.lora.a.dtype)
        db = wide_product(dy.t(), hidden, ctx.lora.b.dtype)
        # The saved hidden features s a x contain the scale, so db does; da still needs it.
        da = da if ctx.lora.scale == 1 else da * ctx.lora.scale
        return None if dx is None else dx.view(shape), da, db, None, None


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product in `dtype`; on CUDA, 16-bit factors give float32 without a rounding between.

    Args:
        left: (p, q).
        right: (q, r).
        dtype: of the product.
    """
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.mm(right).to(dtype)


def with_spare_rows(matrix: Tensor, rank: int) -> Tensor:
    """Copy `matrix` (k, c) into a taller one, with `rank` or more rows of zeros below it.

    Its height is k + `rank`, rounded up to a multiple of ALIGN.
    """
    k, columns = matrix.shape
    buffer = matrix.new_zeros(aligned_height(k + rank), columns)
    buffer[:k] = matrix
    return buffer


def aligned_height(rows: int) -> int:
    """`rows`, rounded up to a multiple of ALIGN."""
    return -(-rows // ALIGN) * ALIGN


class ScratchBuffer:
    """A reusable buffer for one matrix at a time, as large as the largest matrix requested.

    Packed weights are dequantised into it right before they are multiplied.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def view(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the buffer as a matrix (rows, columns), in dtype and on the device of `like`.

        The matrix returned before becomes invalid. That is safe, since operations on one CUDA
        stream run in order: the next layer writes after the previous layer has read.
        """
        size = rows * columns
        buffer = self._buffer
        if buffer is None or buffer.numel() < size:
            self._buffer = buffer = like.new_empty(size)
        return buffer[:size].view(rows, columns)


@torch.no_grad()
def update_operands(loras: Sequence[LoraOperands]) -> None:
    """Copy the trained parameters a and b of each LoRA into the operands `down` and `up`."""
    downs, ups = [lora.down for lora in loras], [lora.up for lora in loras]
    torch._foreach_copy_(downs, [lora.a.detach() for lora in loras])
    if any(lora.scale != 1 for lora in loras):
        torch._foreach_mul_(downs, [lora.scale for lora in loras])
    torch._foreach_copy_(ups, [lora.b.detach().T for lora in loras])
