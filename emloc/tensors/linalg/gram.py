"""Second-moment sums over tokens, precise enough to be decomposed afterwards.

Shapes: N tokens, n and m features; x (N, n), y (N, m), gram (n, n), cross (n, m).

Transformer activations have a few directions hundreds of times stronger than the rest. A float32
sum over all tokens loses the weak directions beside them, so only the products of one short chunk
of tokens are float32 and the chunks are added up in float64. Tensor cores are no way to be faster:
they multiply 16-bit numbers exactly but drop digits where they add them up. On an H200, with four
directions in 5120 a hundred times stronger, their error is 1e-2 of a weak direction's energy for
chunks of 1024 tokens, that of float32 1e-4; and float64, which there takes less time than float32,
has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Eigenvalues this far below the largest are rounding, not data.
NEGLIGIBLE = 1e-10


# Tokens multiplied at once. A GPU multiplies a short chunk faster than it adds an n x n matrix to
# the total.
CHUNK = 256
CHUNK_ON_CUDA = 1024

# Compute capabilities of the chips that are as fast in float64 as in float32, or half as fast.
FLOAT64_CHIPS = {(7, 0), (8, 0), (9, 0), (10, 0)}


def gram(x: Tensor, chunk: int | None = None, total: Tensor | None = None) -> Tensor:
    """X^T X, summed in float64 over chunks of tokens.

    Args:
        x: (N, n) activations, one token a row, any floating dtype.
        chunk: tokens multiplied at once; None for what suits the device.
        total: (n, n) float64 on the device of x, added to in place; None to begin with zeros.

    Returns:
        (n, n) float64 on the device of x: `total` where it is given.

    Raises:
        ValueError: x is not a matrix, total is not n x n in float64, or chunk is below 1.
    """
    return cross(x, x, chunk, total)


def cross(x: Tensor, y: Tensor, chunk: int | None = None, total: Tensor | None = None) -> Tensor:
    """X^T Y by the same precision rule as `gram`.

    Args:
        x: (N, n) activations, one token a row.
        y: (N, m) activations of the same tokens.
        chunk: as in `gram`.
        total: (n, m) float64, as in `gram`.

    Returns:
        (n, m) float64 on the device of x: `total` where it is given.

    Raises:
        ValueError: x or y is not a matrix, their token counts differ, total is not n x m in
            float64, or chunk is below 1.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"need (tokens, features) twice, got {tuple(x.shape)}, {tuple(y.shape)}")
    size = (x.shape[1], y.shape[1])
    if total is None:
        total = x.new_zeros(size, dtype=torch.float64)
    if total.shape != size or total.dtype != torch.float64:
        raise ValueError(f"total must be {size} in float64, got {tuple(total.shape)} {total.dtype}")
    if chunk is None:
        chunk = CHUNK_ON_CUDA if x.is_cuda else CHUNK
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dtype = _precision(x, y)
    with exact_float32(x.device):
        for start in range(0, x.shape[0], chunk):
            left, right = (item.detach()[start : start + chunk].to(dtype) for item in (x, y))
            if dtype == torch.float64:
                total.addmm_(left.T, right)
            else:
                total += left.T @ right
    return total


def product(x: Tensor, y: Tensor) -> Tensor:
    """X Y by the precision of the sums: neither autocast nor TF32 touches it.

    Args:
        x: (p, q) of any floating dtype.
        y: (q, r).

    Returns:
        (p, r) without a graph; float64 where an input is, or where the chip is fast at it, else
        float32.
    """
    dtype = _precision(x, y)
    with exact_float32(x.device):
        return x.detach().to(dtype) @ y.detach().to(dtype)


def _precision(x: Tensor, y: Tensor) -> torch.dtype:
    """What products are formed in."""
    wide = torch.float64 in (x.dtype, y.dtype)
    fast = x.is_cuda and torch.cuda.get_device_capability(x.device) in FLOAT64_CHIPS
    return torch.float64 if wide or fast else torch.float32


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Float32 products are float32: no autocast, no TF32 (CUDA) and no bf16 (oneDNN) inside.

    The precision switches are global to the process, so they are put back on leaving.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def supported(values: Tensor) -> Tensor:
    """Which eigenvalues of a Gram matrix the data supports.

    A Gram matrix has no negative eigenvalue, so a negative one measures the rounding noise of this
    very matrix: whatever is not clearly above it is noise too.

    Args:
        values: (p,) eigenvalues, or singular values, in any order.

    Returns:
        (p,) bool; all False where no value is positive.
    """
    if values.numel() == 0:
        return values > 0
    floor = torch.maximum(NEGLIGIBLE * values.max(), -2 * values.min()).clamp(min=0)
    return values > floor
