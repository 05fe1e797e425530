"""Matrices held in four bits: nf4 with double quantisation (QLoRA). Home of bitsandbytes.

64 numbers in row-major order are a block: four bits each, as a step of the quantiles of a normal
distribution scaled by the block's largest magnitude. These magnitudes are held in 8 bits: the mean
of all, and 256 at a time what is left of them, scaled by the largest of it (QLoRA, section 3). Half
a byte and 1/64 byte a number, and a little.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# It asks for one more package, at every import, for inference on some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
from bitsandbytes.functional import (  # noqa: E402
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)

BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a scale
PARTS = ("codes", "absmax", "scales")  # the tensors of a matrix


@dataclass(frozen=True, eq=False)
class Nf4:
    """A matrix (rows, columns) in nf4. The tensors are never written to."""

    codes: Tensor  # uint8, two numbers a byte, the first one in the high bits; whole blocks
    absmax: Tensor  # uint8, (blocks,)
    scales: Tensor  # float32, (1 + groups,): the mean of the magnitudes, then the groups' scales
    shape: tuple[int, int]
    dtype: torch.dtype  # of the matrix: what it was quantised from, and is multiplied in

    @staticmethod
    def quantize(matrix: Tensor) -> Nf4:
        """The nearest codes of a matrix in float32 or 16 bits, on its device.

        Raises:
            ValueError: it is no matrix, or of another type.
        """
        if matrix.dim() != 2:
            raise ValueError(f"need a matrix, got a tensor of shape {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        # Whole blocks, one a row: bitsandbytes' CPU kernel takes the scales of other widths from
        # the wrong blocks (multiples of 16 that are none of 64, in 0.50).
        flat = matrix.detach().reshape(-1)
        flat = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = quantize_4bit(
            flat, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scales = torch.cat([state.offset.reshape(1), state.state2.absmax])
        return Nf4(codes, state.absmax, scales, (rows, columns), matrix.dtype)

    @staticmethod
    def nowhere(rows: int, columns: int, dtype: torch.dtype) -> Nf4:
        """A matrix of that shape on the meta device, without numbers."""
        blocks = -(-rows * columns // BLOCK)
        there = torch.empty(0, dtype=torch.uint8, device="meta")
        codes, absmax = there.new_empty(blocks * BLOCK // 2, 1), there.new_empty(blocks)
        scales = there.new_empty(1 + -(-blocks // GROUP), dtype=torch.float32)
        return Nf4(codes, absmax, scales, (rows, columns), dtype)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The matrix (rows, columns), in `out` if given: contiguous, of this shape and dtype.

        Raises:
            ValueError: `out` is none of these.
        """
        if out is not None and not (
            out.shape == self.shape and out.dtype == self.dtype and out.is_contiguous()
        ):
            raise ValueError(
                f"need {self.shape} {self.dtype} contiguous, got {tuple(out.shape)} {out.dtype}"
            )
        size = self.shape[0] * self.shape[1]
        state = self._by_blocks
        if out is not None and out.is_cuda and size % BLOCK == 0:  # what no other kernel takes
            dequantize_4bit(self.codes, state, out=out.view(-1, BLOCK))
            return out
        matrix: Tensor = dequantize_4bit(self.codes, state)
        matrix = matrix.view(-1)[:size].view(self.shape)
        return matrix if out is None else out.copy_(matrix)

    @cached_property
    def _by_blocks(self) -> QuantState:
        """Made once: to describe a matrix takes the host longer than the device to form it."""
        return self._state(torch.Size((self.absmax.numel(), BLOCK)))

    def _state(self, shape: torch.Size) -> QuantState:
        steps, scale_steps = _steps(self.codes.device)
        nested = QuantState(
            absmax=self.scales[1:], code=scale_steps, blocksize=GROUP, dtype=torch.float32
        )
        return QuantState(
            absmax=self.absmax,
            shape=shape,
            code=steps,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.scales[0],
            state2=nested,
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What a safetensors file has to hold, by name; shape and dtype as a tensor of no bytes."""
        like = torch.empty((*self.shape, 0), dtype=self.dtype)
        parts = {"codes": self.codes, "absmax": self.absmax, "scales": self.scales, "like": like}
        return {f"{prefix}.{name}": tensor for name, tensor in parts.items()}

    @staticmethod
    def from_tensors(prefix: str, mapping: Mapping[str, Tensor]) -> Nf4:
        """What `tensors` took apart.

        Raises:
            KeyError: a part is missing.
        """
        like = mapping[f"{prefix}.like"]
        codes, absmax, scales = (mapping[f"{prefix}.{part}"] for part in PARTS)
        return Nf4(codes, absmax, scales, (like.shape[0], like.shape[1]), like.dtype)

    def to(self, device: torch.device) -> Nf4:
        """The same on `device`."""
        moved = {name: getattr(self, name).to(device) for name in PARTS}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all it holds."""
        return self.codes.nbytes + self.absmax.nbytes + self.scales.nbytes


def nf4_bytes(rows: int, columns: int) -> int:
    """`Nf4.nbytes` of a matrix, without having one."""
    blocks = -(-rows * columns // BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * (1 + -(-blocks // GROUP))


@cache
def _steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of numbers (16) and of magnitudes (256) stand for, which never differs."""
    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


class Multiply(torch.autograd.Function):
    """x (..., n) by a frozen matrix that is formed for the moment, forwards and backwards.

    The map is linear, so that nothing at all is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Nf4, turned: bool) -> Tensor:
        """`x M^T`, as a linear layer multiplies; `turned`, with M held as its transpose: `x M`."""
        ctx.matrix, ctx.turned = matrix, turned
        return _product(x, matrix, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        return _product(grads[0], ctx.matrix, not ctx.turned), None, None


def _product(x: Tensor, matrix: Nf4, turned: bool) -> Tensor:
    full = matrix.dequantize()
    return x @ full if turned else functional.linear(x, full)


def multiply(x: Tensor, matrix: Nf4, *, turned: bool = False) -> Tensor:
    """`x M^T` (`turned`: `x M`) in the dtype of the matrix, differentiable in x."""
    result: Tensor = Multiply.apply(x.to(matrix.dtype), matrix, turned)  # type: ignore[no-untyped-call]
    return result


class Nf4Linear(bitsandbytes.nn.Linear4bit):
    """A linear layer whose weight (out, in) is in nf4; one of bitsandbytes', to PEFT.

    Only the products are its own: bitsandbytes' read some widths wrongly on a CPU (see `Nf4`), and
    in eval mode repack the weight into something that has no gradient.
    """

    def __init__(self, weight: Nf4, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(
            columns,
            rows,
            bias=False,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device=torch.device("meta"),
        )
        self.weight = bitsandbytes.nn.Params4bit(
            weight.codes,
            requires_grad=False,
            quant_state=weight._state(torch.Size(weight.shape)),
            quant_type="nf4",
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = self.weight.quant_state
        # As bytes: a model cast to another dtype would round the scales.
        self.register_buffer("scales", weight.scales.view(torch.uint8), False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> Nf4:
        """The weight as a value, in the tensors that the layer holds."""
        state = self.weight.quant_state
        scales = self.get_buffer("scales").view(torch.float32)
        shape = (self.out_features, self.in_features)
        return Nf4(self.weight.data, state.absmax, scales, shape, state.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype the weight was quantised from."""
        y = multiply(x, self.matrix)
        return y if self.bias is None else y + self.bias
