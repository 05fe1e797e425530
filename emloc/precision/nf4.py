"""The format nf4: four bits with double quantisation (QLoRA, section 3), by bitsandbytes.

64 numbers in row-major order form a block. Each number is a 4-bit code for a quantile of the normal
distribution, times the block's largest magnitude. These magnitudes are quantised to 8 bits: their
overall mean is subtracted, and groups of 256 differences share a scale, their largest magnitude. A
number takes 1/2 + 1/64 byte and a little more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Layout, Packed, PackedLayer, Precision, multiply
from emloc.precision.kernel_trial import tried

# At every import bitsandbytes would suggest another package, for inference on some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
from bitsandbytes.functional import (  # noqa: E402
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)

log = logging.getLogger(__name__)

# Dequantises the parts of a matrix into a tensor, as `nf4_kernel.unpack` does.
Kernel = Callable[[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor, int, int], Tensor]

BITS = 4
BLOCK = 64  # number of weights that share a scale
GROUP = 256  # number of blocks whose scales share a second scale


@dataclass(frozen=True, kw_only=True)
class Nf4(Precision):
    """The nf4 format, which packs a matrix into the parts `codes`, `absmax` and `scales`.

    codes: uint8, two numbers per byte, the first in the high bits; padded to full blocks.
    absmax: uint8 (blocks,), the quantised magnitude of each block.
    scales: float32 (1 + groups,): the mean of all magnitudes, then the scale of each group.
    """

    dequantize_operations = 6
    # PEFT uses its bitsandbytes layers only for models with this attribute.
    attributes = MappingProxyType({"is_loaded_in_4bit": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != BITS:
            raise ConfigError(
                f"precision.bits={self.bits}: precision={self.name} has {BITS} bits; "
                f"set precision.bits={BITS}"
            )

    def layout(self, rows: int, columns: int) -> Layout:
        """The parts of a matrix: half a byte per number, a byte per block, four bytes per group."""
        blocks = -(-rows * columns // BLOCK)
        return {
            "codes": ((blocks * BLOCK // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "scales": ((1 + -(-blocks // GROUP),), torch.float32),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Quantise a matrix to the nearest codes."""
        # One full block per row: for widths that are multiples of 16 but not of 64, the CPU kernel
        # of bitsandbytes 0.50 reads the scales of wrong blocks.
        flat = matrix.reshape(-1)
        flat = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = _quantize(flat)
        scales = torch.cat([state.offset.reshape(1), state.state2.absmax])
        return {"codes": codes, "absmax": state.absmax, "scales": scales}

    def prepare(self, packed: Packed) -> QuantState:
        """Build bitsandbytes' `QuantState`, which takes longer than to dequantise the matrix."""
        blocks = packed.parts["absmax"].numel()
        return _state(packed.parts, torch.Size((blocks, BLOCK)), packed.dtype)

    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Dequantise a matrix, directly into `out` if the kernel supports this."""
        rows, columns = packed.shape
        size = rows * columns
        codes = packed.parts["codes"]
        if codes.is_cuda and (kernel := _kernel(codes.device)) is not None:
            into = codes.new_empty((rows, columns), dtype=packed.dtype) if out is None else out
            return _by(kernel, packed, into)
        state = packed.prepared
        if out is not None and out.is_cuda and size % BLOCK == 0:  # other kernels ignore `out`
            dequantize_4bit(codes, state, out=out.view(-1, BLOCK))
            return out
        matrix: Tensor = dequantize_4bit(codes, state)
        return matrix.view(-1)[:size].view(rows, columns)

    def linear(self, matrix: Packed, bias: Tensor | None = None) -> nn.Module:
        """Return a layer of bitsandbytes' class `Linear4bit`, which PEFT recognises."""
        return Nf4Linear(matrix, bias)

    def unreadable_reason(self, rows: int, columns: int, device: torch.device) -> str | None:
        """Reason why PEFT reads the weight wrongly: a bug in bitsandbytes on CPUs (see `pack`)."""
        if device.type != "cpu" or columns % BLOCK == 0:
            return None
        return (
            f"on a CPU bitsandbytes reads a {self.bits}-bit weight wrongly unless its width, "
            f"{columns}, is a multiple of {BLOCK}"
        )


def _quantize(blocks: Tensor) -> tuple[Tensor, QuantState]:
    """The codes and the state of rows of `BLOCK` numbers each, by bitsandbytes.

    bitsandbytes 0.50 quantises on the default stream of a GPU. So all of it takes place there,
    behind what the current stream has been given so far, and the current stream waits for it.
    """
    quantize = partial(quantize_4bit, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    if not blocks.is_cuda:
        return quantize(blocks)
    current = torch.cuda.current_stream(blocks.device)
    default = torch.cuda.default_stream(blocks.device)
    if current == default:
        return quantize(blocks)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        codes, state = quantize(blocks)
    current.wait_stream(default)
    for tensor in (codes, state.absmax, state.offset, state.state2.absmax):
        tensor.record_stream(current)
    return codes, state


def _state(parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> QuantState:
    """The `QuantState` by which bitsandbytes interprets the codes of a matrix."""
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
def _kernel(device: torch.device) -> Kernel | None:
    """Return the Triton kernel for a GPU; None, with a log line, if it does not work there."""
    precision = Nf4(name="nf4", bits=BITS)
    trial = torch.linspace(-1, 1, 3 * 130, device=device, dtype=torch.bfloat16).view(3, 130)
    packed = Packed(precision, precision.pack(trial), (3, 130), trial.dtype)
    expected: Tensor = dequantize_4bit(packed.parts["codes"], packed.prepared)

    def trial_run() -> tuple[Kernel, bool]:
        from emloc.precision.nf4_kernel import unpack

        actual = _by(unpack, packed, torch.empty_like(trial))
        flat = expected.view(-1)[: actual.numel()]
        return unpack, torch.allclose(actual.view(-1), flat, rtol=0.01)

    return tried(trial_run, "nf4: bitsandbytes dequantises")


def _by(kernel: Kernel, packed: Packed, out: Tensor) -> Tensor:
    """Dequantise a matrix into `out` by a kernel."""
    parts = (packed.parts["codes"], packed.parts["absmax"], packed.parts["scales"])
    return kernel(parts, *_steps(out.device), out, BLOCK, GROUP)


@cache
def _steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the 16 codes for numbers and of the 256 codes for magnitudes, all constants."""
    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


class Nf4Linear(PackedLayer, bitsandbytes.nn.Linear4bit):
    """A frozen linear layer with an nf4 weight (out, in), which PEFT treats as a `Linear4bit`.

    It computes the matrix products itself. Those of bitsandbytes read some widths wrongly on the
    CPU (see `Nf4.pack`), and in eval mode they repack the weight and lose the gradient of x.
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
        # Registered as bytes, since casting the model to another dtype would round the scales.
        self.register_buffer("scales", weight.parts["scales"].view(torch.uint8), False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> Packed:
        """The packed weight (out, in), as a view of the layer's tensors."""
        state: Any = self.weight.quant_state
        scales = self.get_buffer("scales").view(torch.float32)
        parts = {"codes": self.weight.data, "absmax": state.absmax, "scales": scales}
        shape = (self.out_features, self.in_features)
        return Packed(self.precision, parts, shape, state.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to y (..., out), in the dtype that the weight was quantised from."""
        y = multiply(x, self.matrix)
        return y if self.bias is None else y + self.bias
