"""Four bits: nf4 with double quantisation (QLoRA). Home of bitsandbytes.

64 numbers in row-major order are a block: four bits each, as a step of the quantiles of a normal
distribution scaled by the block's largest magnitude. These magnitudes are held in 8 bits: the mean
of all, and 256 at a time what is left of them, scaled by the largest of it (QLoRA, section 3). Half
a byte and 1/64 byte a number, and a little.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Layout, Packed, PackedLayer, Precision, multiply

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

BITS = 4
BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a scale


@dataclass(frozen=True, kw_only=True)
class Nf4(Precision):
    """A matrix is `codes`, `absmax` and `scales`.

    codes: uint8, two numbers a byte, the first one in the high bits; whole blocks.
    absmax: uint8, (blocks,).
    scales: float32, (1 + groups,): the mean of the magnitudes, then the groups' scales.
    """

    forming = 6
    attributes = MappingProxyType({"is_loaded_in_4bit": True})  # or PEFT takes no bitsandbytes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != BITS:
            raise ConfigError(
                f"precision.bits={self.bits}: precision={self.name} has {BITS}; "
                f"set precision.bits={BITS}"
            )

    def layout(self, rows: int, columns: int) -> Layout:
        """Half a byte a number, a byte a block, four bytes a group and for the mean."""
        blocks = -(-rows * columns // BLOCK)
        return {
            "codes": ((blocks * BLOCK // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "scales": ((1 + -(-blocks // GROUP),), torch.float32),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The nearest codes."""
        # Whole blocks, one a row: bitsandbytes' CPU kernel takes the scales of other widths from
        # the wrong blocks (multiples of 16 that are none of 64, in 0.50).
        flat = matrix.reshape(-1)
        flat = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = quantize_4bit(
            flat, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scales = torch.cat([state.offset.reshape(1), state.state2.absmax])
        return {"codes": codes, "absmax": state.absmax, "scales": scales}

    def prepare(self, packed: Packed) -> QuantState:
        """To describe a matrix takes the host longer than the device to form it."""
        blocks = packed.parts["absmax"].numel()
        return _state(packed.parts, torch.Size((blocks, BLOCK)), packed.dtype)

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """The matrix, written where it is to lie if a kernel can do so."""
        rows, columns = packed.shape
        size = rows * columns
        codes, state = packed.parts["codes"], packed.prepared
        if out is not None and out.is_cuda and size % BLOCK == 0:  # what no other kernel takes
            dequantize_4bit(codes, state, out=out.view(-1, BLOCK))
            return out
        matrix: Tensor = dequantize_4bit(codes, state)
        return matrix.view(-1)[:size].view(rows, columns)

    def linear(self, matrix: Packed, bias: Tensor | None = None) -> nn.Module:
        """A layer of bitsandbytes' class, which PEFT knows."""
        return Nf4Linear(matrix, bias)

    def unreadable(self, rows: int, columns: int, device: torch.device) -> str | None:
        """PEFT has bitsandbytes form the weight, which reads some widths wrongly (see `pack`)."""
        if device.type != "cpu" or columns % BLOCK == 0:
            return None
        return (
            f"on a CPU bitsandbytes reads one of {self.bits} bits wrongly unless its width, "
            f"{columns}, is a multiple of {BLOCK}"
        )


def _state(parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> QuantState:
    """What bitsandbytes has to know beside the codes of a matrix."""
    scales = parts["scales"]
    steps, scale_steps = _steps(scales.device)
    nested = QuantState(absmax=scales[1:], code=scale_steps, blocksize=GROUP, dtype=torch.float32)
    return QuantState(
        absmax=parts["absmax"],
        shape=shape,
        code=steps,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=scales[0],
        state2=nested,
    )


@cache
def _steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of numbers (16) and of magnitudes (256) stand for, which never differs."""
    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


class Nf4Linear(PackedLayer, bitsandbytes.nn.Linear4bit):
    """A linear layer whose weight (out, in) is in nf4; one of bitsandbytes', to PEFT.

    Only the products are its own: bitsandbytes' read some widths wrongly on a CPU (see `Nf4.pack`),
    and in eval mode repack the weight into something that has no gradient.
    """

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(
            columns,
            rows,
            bias=False,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device=torch.device("meta"),
        )
        self.precision = weight.precision
        self.weight = bitsandbytes.nn.Params4bit(
            weight.parts["codes"],
            requires_grad=False,
            quant_state=_state(weight.parts, torch.Size(weight.shape), weight.dtype),
            quant_type="nf4",
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = self.weight.quant_state
        # As bytes: a model cast to another dtype would round the scales.
        self.register_buffer("scales", weight.parts["scales"].view(torch.uint8), False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> Packed:
        """The weight as a value, in the tensors that the layer holds."""
        state: Any = self.weight.quant_state
        scales = self.get_buffer("scales").view(torch.float32)
        parts = {"codes": self.weight.data, "absmax": state.absmax, "scales": scales}
        shape = (self.out_features, self.in_features)
        return Packed(self.precision, parts, shape, state.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype the weight was quantised from."""
        y = multiply(x, self.matrix)
        return y if self.bias is None else y + self.bias
