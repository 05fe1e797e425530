"""Round the rows of a span with error feedback in one GPU kernel (Triton).

Row by row, torch would launch some ten kernels for each of thousands of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 32  # that one program rounds


# Triton reads annotations, and knows those of its own only.
@triton.jit  # type: ignore[untyped-decorator]
def _round(
    rows: tl.tensor,
    steps: tl.tensor,
    zeros: tl.tensor,
    corner: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    levels: tl.constexpr,
    span: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    is_column = column < width
    index = tl.arange(0, span)
    inside = (index < count)[:, None] & is_column[None, :]
    values = tl.load(rows + index[:, None] * width + column[None, :], mask=inside, other=0)
    for row in range(count):
        at = row * width + column
        value = tl.sum(tl.where(index[:, None] == row, values, 0), 0)
        step = tl.load(steps + at, mask=is_column, other=1)
        zero = tl.load(zeros + at, mask=is_column, other=0)
        code = tl.floor(value / step + zero + 0.5)
        code = tl.minimum(tl.maximum(code, 0), levels)
        error = value - (code - zero) * step
        error /= tl.load(corner + row * count + row)
        tl.store(codes + at, code.to(tl.uint8), mask=is_column)
        tl.store(errors + at, error, mask=is_column)
        later = (index > row) & (index < count)
        share = tl.load(corner + row * count + index, mask=later, other=0)
        values -= share[:, None] * error[None, :]


def round_span(
    rows: Tensor, steps: Tensor, zeros: Tensor, corner: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Return codes and errors (s, m) of the rows of a span, as `error_feedback` defines them.

    Args:
        rows: (s, m) float32, contiguous; s is at most 64.
        steps: (s, m) float32, contiguous.
        zeros: (s, m) float32, contiguous.
        corner: (s, s) float32, contiguous.
        levels: the largest code.
    """
    count, width = rows.shape
    codes, errors = torch.empty_like(rows, dtype=torch.uint8), torch.empty_like(rows)
    span = triton.next_power_of_2(count)
    with torch.cuda.device(rows.device):
        _round[(triton.cdiv(width, _COLUMNS),)](
            *(rows, steps, zeros, corner, codes, errors, count, width, levels, span, _COLUMNS)
        )
    return codes, errors
