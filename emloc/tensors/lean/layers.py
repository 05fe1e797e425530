"""Frozen linear layers and their LoRAs as one autograd function with fewer matrix products.

Shapes: N tokens, x (N, n), y (N, m), LoRA a (r, n), b (m, r), scale s. A factorised layer u v with
its LoRA is a factorised layer of rank k + r,

    y = [u, b] [v; s a] x,

so two matrix products replace four products, two scalings and a sum. For a dense weight W, the
LoRA's output is accumulated onto W x in place. PEFT keeps owning the parameters a and b, so saved
adapters do not change.

One function computes all layers that read the same x, such as query, key and value. The matrices
s a of these layers, or [v; s a], are stacked: x is multiplied by the stacked matrix once. In the
backward pass, the gradients of all a are one product, and so is the stacked matrix's part of dx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# Tensor cores read 16-bit rows at full speed if they start at multiples of 16 bytes (8 numbers).
# Padding with a few rows of zeros costs less than reading unaligned rows.
ALIGN = 8

# Returns a matrix. It is a function, so that a packed matrix is dequantised per product.
Matrix = Callable[[], Tensor]


@dataclass(frozen=True)
class LoraOperands:
    """The LoRA of one layer: PEFT's parameters, and copies of them in the dtype of the layer."""

    a: nn.Parameter  # (r, n)
    b: nn.Parameter  # (m, r)
    scale: float
    down: Tensor  # (r, n), s a
    up: Tensor  # (r, m), b^T

    @cached_property
    def up_view(self) -> Tensor:
        """`up` in the shape (m, r) of b; one view for all passes."""
        return self.up.t()


class FrozenLayers(Protocol):
    """Frozen layers that read the same input, computed together with their LoRAs.

    The LoRAs have the same scale and dtype. R is the sum of their ranks r.
    """

    @property
    def loras(self) -> Sequence[LoraOperands]:
        """The LoRAs of the layers."""

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return each layer's output y (N, m) with its LoRA, and the LoRAs' hidden features s a x
        (N, R).
        """

    def backward(
        self, dys: Sequence[Tensor | None], needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x (N, n), or None unless `needs_dx`, and of the LoRAs' hidden
        features (N, R).

        Args:
            dys: gradient (N, m) of each output, not all None; None for an output without one.
            needs_dx: whether x needs a gradient.
        """


@dataclass(frozen=True)
class DenseLayer:
    """A frozen layer with a weight (m, n), and its LoRA."""

    weight: Matrix
    bias: Tensor | None  # (m,)
    lora: LoraOperands


class DenseLayers:
    """Dense frozen layers.

    Args:
        layers: the layers, in the order of their rows.
        down: (R, n), the operands `down` of all LoRAs.
    """

    def __init__(self, layers: Sequence[DenseLayer], down: Tensor) -> None:
        self._layers, self._down = layers, down
        self.loras = [layer.lora for layer in layers]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute W x + bias and add each LoRA's output in place; see `FrozenLayers.forward`."""
        hidden = x.mm(self._down.t())
        ys = [
            functional.linear(x, layer.weight(), layer.bias).addmm_(own, layer.lora.up)
            for layer, own in zip(self._layers, split(hidden, ranks(self.loras), 1), strict=True)
        ]
        return ys, hidden

    def backward(
        self, dys: Sequence[Tensor | None], needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Add up dx in place from each W and the LoRAs; see `FrozenLayers.backward`."""
        hidden = _products(dys, (lora.up_view for lora in self.loras), ranks(self.loras))
        if not needs_dx:
            return None, hidden
        dx: Tensor | None = None  # not allocated until the first packed weight is dequantised
        for dy, layer in zip(dys, self._layers, strict=True):
            if dy is not None:
                weight = layer.weight()
                dx = dy.mm(weight) if dx is None else dx.addmm_(dy, weight)
        assert dx is not None
        return dx.addmm_(hidden, self._down), hidden


@dataclass(frozen=True)
class FactorizedLayer:
    """A frozen layer of rank k with its LoRA, as one factorised layer."""

    rank: int  # k
    up: Matrix  # [u, b]^T (p, m); p is k + r, padded with rows of zeros to a multiple of `ALIGN`
    bias: Tensor | None  # (m,)
    lora: LoraOperands

    @property
    def height(self) -> int:
        """The number of rows p."""
        return aligned_height(self.rank + len(self.lora.down))


class FactorizedLayers:
    """Factorised frozen layers, whose matrices [v; s a] (p, n) are the rows of one matrix.

    Args:
        layers: the layers, in the order of their rows.
        down: returns the matrix (P, n); P is the sum of the heights p.
        device: the device of the matrices.
    """

    def __init__(
        self, layers: Sequence[FactorizedLayer], down: Matrix, device: torch.device
    ) -> None:
        self._layers, self._down = layers, down
        self.loras = [layer.lora for layer in layers]
        self._heights = [layer.height for layer in layers]
        starts = accumulate(self._heights, initial=0)
        rows = [
            start + layer.rank + row
            for start, layer in zip(starts, layers, strict=False)
            for row in range(len(layer.lora.down))
        ]
        self._lora_rows = torch.tensor(rows, device=device)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Multiply x by the matrices of all layers; see `FrozenLayers.forward`."""
        hidden = x.mm(self._down().t())
        ys = []
        for layer, own in zip(self._layers, split(hidden, self._heights, 1), strict=True):
            up = layer.up()
            ys.append(own.mm(up) if layer.bias is None else torch.addmm(layer.bias, own, up))
        return ys, self._of_loras(hidden)

    def backward(
        self, dys: Sequence[Tensor | None], needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Multiply each dy by the transposed matrices; see `FrozenLayers.backward`."""
        hidden = _products(dys, (layer.up().t() for layer in self._layers), self._heights)
        return hidden.mm(self._down()) if needs_dx else None, self._of_loras(hidden)

    def _of_loras(self, hidden: Tensor) -> Tensor:
        """A copy of the LoRAs' columns (N, R) of the hidden features (N, P) of bases and LoRAs.

        A view, saved for the backward pass, would keep all hidden features in memory.
        """
        return hidden.index_select(1, self._lora_rows)


class JointLayers:
    """Factorised frozen layers with one v: [v; s a ...] (P, n), with the LoRAs of all layers.

    The matrix [u, b]^T (P, m) of a layer has rows of zeros where the LoRAs of the others are. So
    one product by v serves all layers, and each further layer takes one.

    Args:
        ups: returns the matrix (P, m) of each layer.
        biases: the bias (m,) of each layer, or None.
        loras: the LoRA of each layer.
        down: returns the matrix (P, n).
        rank: k, after whose rows those of the LoRAs begin.
    """

    def __init__(
        self,
        ups: Sequence[Matrix],
        biases: Sequence[Tensor | None],
        loras: Sequence[LoraOperands],
        down: Matrix,
        rank: int,
    ) -> None:
        self._ups, self._biases, self.loras, self._down = ups, biases, loras, down
        self._of_loras = slice(rank, rank + sum(ranks(loras)))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Multiply x by v and all LoRAs at once; see `FrozenLayers.forward`."""
        hidden = x.mm(self._down().t())
        ys = [
            hidden.mm(up()) if bias is None else torch.addmm(bias, hidden, up())
            for up, bias in zip(self._ups, self._biases, strict=True)
        ]
        # A view, saved for the backward pass, would keep all hidden features in memory.
        return ys, hidden[:, self._of_loras].contiguous()

    def backward(
        self, dys: Sequence[Tensor | None], needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Add up the hidden gradients of all layers; see `FrozenLayers.backward`."""
        hidden: Tensor | None = None
        for dy, up in zip(dys, self._ups, strict=True):
            if dy is not None:
                matrix = up().t()
                hidden = dy.mm(matrix) if hidden is None else hidden.addmm_(dy, matrix)
        assert hidden is not None
        dx = hidden.mm(self._down()) if needs_dx else None
        return dx, hidden[:, self._of_loras].contiguous()


def _products(
    dys: Sequence[Tensor | None], matrices: Iterable[Tensor], widths: Sequence[int]
) -> Tensor:
    """Products of each dy (N, m) and its matrix (m, width), side by side; zeros if dy is None."""
    like = next(dy for dy in dys if dy is not None)
    if len(dys) == 1:
        (matrix,) = matrices
        return like.mm(matrix)
    new = like.new_zeros if any(dy is None for dy in dys) else like.new_empty
    products = new(len(like), sum(widths))
    for dy, matrix, out in zip(dys, matrices, split(products, widths, 1), strict=True):
        if dy is not None:
            torch.mm(dy, matrix, out=out)
    return products


class FusedLora(torch.autograd.Function):
    """Frozen layers and their LoRAs as one function of the input x that the layers share.

    It saves only x and the LoRAs' hidden features (N, R) for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: FrozenLayers, on_backward: Callable[[], None], *_: Tensor
    ) -> tuple[Tensor, ...]:
        """Output (..., m) of each layer with its LoRA.

        Args:
            ctx: autograd's context.
            x: (..., n).
            layers: the layers.
            on_backward: called when the backward pass begins.
            _: the parameters a of all layers, then the parameters b.
        """
        flat = x.reshape(-1, x.shape[-1])
        ys, hidden = layers.forward(flat)
        ctx.save_for_backward(flat, hidden)
        ctx.set_materialize_grads(False)  # an output that the loss does not depend on
        ctx.layers, ctx.on_backward = layers, on_backward
        # Not a view of y: some models, such as Falcon, add to the output in place, and autograd
        # forbids that for a view which a custom function returns.
        return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, of each a and of each b; None for an a and b whose output has none."""
        ctx.on_backward()
        flat, hidden = ctx.saved_tensors
        loras: Sequence[LoraOperands] = ctx.layers.loras
        outer = next((grad.shape[:-1] for grad in grads if grad is not None), None)
        if outer is None:
            return (None,) * (3 + 2 * len(loras))
        dys = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx, dhidden = ctx.layers.backward(dys, ctx.needs_input_grad[0])
        da = wide_product(dhidden.t(), flat, loras[0].a.dtype)
        # The saved hidden features s a x contain the scale, so db does; da still needs it.
        if loras[0].scale != 1:
            da.mul_(loras[0].scale)
        das, dbs = [], []
        columns = split(hidden, ranks(loras), 1)
        for dy, own, rows in zip(dys, columns, split(da, ranks(loras), 0), strict=True):
            das.append(None if dy is None else rows)
            dbs.append(None if dy is None else wide_product(dy.t(), own, loras[0].b.dtype))
        return None if dx is None else dx.view(*outer, flat.shape[-1]), None, None, *das, *dbs


def ranks(loras: Sequence[LoraOperands]) -> list[int]:
    """The rank r of each LoRA."""
    return [len(lora.down) for lora in loras]


def split(matrix: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    """Split a matrix along `dim` into views of these sizes; the matrix itself if there is one."""
    return (matrix,) if len(sizes) == 1 else matrix.split_with_sizes(list(sizes), dim)


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


def with_spare_rows(matrices: Sequence[Tensor], spare: Sequence[int]) -> Tensor:
    """Copy matrices (k, c) below each other, each with `spare` or more rows of zeros below it.

    Each of them then has k + `spare` rows, rounded up to a multiple of `ALIGN`.
    """
    heights = [aligned_height(len(one) + rows) for one, rows in zip(matrices, spare, strict=True)]
    stacked = matrices[0].new_zeros(sum(heights), matrices[0].shape[1])
    for block, matrix in zip(split(stacked, heights, 0), matrices, strict=True):
        block[: len(matrix)] = matrix
    return stacked


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
    downs = [lora.down for lora in loras]
    torch._foreach_copy_(downs, [lora.a for lora in loras])
    if any(lora.scale != 1 for lora in loras):
        torch._foreach_mul_(downs, [lora.scale for lora in loras])
    torch._foreach_copy_([lora.up_view for lora in loras], [lora.b for lora in loras])
