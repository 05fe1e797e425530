"""Dequantise a matrix with evenly spaced levels in one GPU kernel (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # that one program writes


# Triton reads annotations, and knows those of its own only.
@triton.jit  # type: ignore[untyped-decorator]
def _unpack(
    codes: tl.tensor,
    steps: tl.tensor,
    zeros: tl.tensor,
    top: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    bits: tl.constexpr,
    group: tl.constexpr,
    steps_per_octave: tl.constexpr,
    span: tl.constexpr,
) -> None:
    levels: tl.constexpr = 2**bits - 1
    row_bytes = groups * (group * bits // 8)
    number = tl.program_id(0).to(tl.int64) * span + tl.arange(0, span)
    inside = number < rows * columns.to(tl.int64)
    row = number // columns
    column = number - row * columns
    # A code may begin in one byte and end in the next one, which belongs to the same row.
    bit = column * bits
    byte = row * row_bytes + bit // 8
    word = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    if 8 % bits:
        crosses = inside & (bit % 8 + bits > 8)
        word |= tl.load(codes + byte + 1, mask=crosses, other=0).to(tl.int32) << 8
    code = ((word >> (bit % 8).to(tl.int32)) & levels).to(tl.float32)
    at = row * groups + column // group
    step_code = tl.load(steps + at, mask=inside, other=0).to(tl.float32)
    zero_code = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
    step = tl.load(top) * tl.exp2(-step_code / steps_per_octave)
    value = (code - zero_code * (levels / 255)) * step
    tl.store(out + number, value.to(out.dtype.element_ty), mask=inside)


def unpack(
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor,
    top: Tensor,
    out: Tensor,
    bits: int,
    group: int,
    steps_per_octave: int,
) -> Tensor:
    """Fill the contiguous matrix `out` (rows, columns) with its numbers, and return it.

    Args:
        codes: with `steps`, `zeros` and `top` the parts of the matrix, as `Uniform` defines them.
        steps: (rows, groups) uint8.
        zeros: (rows, groups) uint8.
        top: (1,) float32.
        out: of any float dtype, on the device of the parts.
        bits: of a code; at most eight.
        group: how many numbers of a row share a step and a zero.
        steps_per_octave: by how many codes a step is halved.
    """
    rows, columns = out.shape
    sizes = (rows, columns, steps.shape[1], bits, group, steps_per_octave, _NUMBERS)
    with torch.cuda.device(out.device):
        _unpack[(triton.cdiv(out.numel(), _NUMBERS),)](codes, steps, zeros, top, out, *sizes)
    return out
