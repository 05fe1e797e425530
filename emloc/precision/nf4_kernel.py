"""Dequantise an nf4 matrix in one GPU kernel (Triton).

bitsandbytes takes four: one fills new memory, and the others compute the magnitudes of the blocks,
their sum with the mean, and the numbers. No library has one for double quantisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024  # of codes that one program reads


# Triton reads annotations, and knows those of its own only.
@triton.jit  # type: ignore[untyped-decorator]
def _unpack(
    codes: tl.tensor,
    absmax: tl.tensor,
    scales: tl.tensor,
    steps: tl.tensor,
    scale_steps: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    bytes_of_block: tl.constexpr,
    group: tl.constexpr,
    span: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * span
    byte = first + tl.arange(0, span)
    is_byte = byte < (size + 1) // 2
    code = tl.load(codes + byte, mask=is_byte, other=0).to(tl.int32)
    block = byte // bytes_of_block
    magnitude = tl.load(scale_steps + tl.load(absmax + block, mask=is_byte, other=0).to(tl.int32))
    magnitude *= tl.load(scales + 1 + block // group, mask=is_byte, other=0)
    magnitude += tl.load(scales)
    high = tl.load(steps + (code >> 4)) * magnitude
    low = tl.load(steps + (code & 15)) * magnitude
    number = 2 * first + tl.arange(0, 2 * span)
    numbers = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + number, numbers, mask=number < size)


def unpack(
    parts: tuple[Tensor, Tensor, Tensor],
    steps: Tensor,
    scale_steps: Tensor,
    out: Tensor,
    block: int,
    group: int,
) -> Tensor:
    """Fill the contiguous tensor `out` with the numbers of a packed matrix, and return it.

    Args:
        parts: codes, absmax and scales, as `Nf4` defines them.
        steps: (16,) float32, the values of the codes.
        scale_steps: (256,) float32, the values of the codes of magnitudes.
        out: of any float dtype, on the device of the parts.
        block: how many numbers share a magnitude; an even number.
        group: how many magnitudes share a scale.
    """
    size = out.numel()
    programs = triton.cdiv(size, 2 * _BYTES)
    with torch.cuda.device(out.device):
        _unpack[(programs,)](*parts, steps, scale_steps, out, size, block // 2, group, _BYTES)
    return out
