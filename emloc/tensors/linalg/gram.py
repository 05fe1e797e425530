"""Sums of second moments over tokens, precise enough for an eigendecomposition.

Shapes: N tokens, n and m features; x (N, n), y (N, m), gram (n, n), cross (n, m).

Transformer activations have a few directions that are hundreds of times stronger than the rest. A
float32 sum over all tokens would lose the weak directions. So only the products within a short
chunk of tokens are float32, and the chunks are summed in float64.

Tensor cores are no faster alternative: they multiply 16-bit numbers exactly, but lose digits in the
sums. Measured on an H200, with four of 5120 directions a hundred times stronger and chunks of 1024
tokens: the error is 1e-2 of a weak direction's energy with tensor cores, 1e-4 in float32, and none
in float64, which is faster than float32 on this chip.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Eigenvalues below this fraction of the largest are rounding errors, not data.
NEGLIGIBLE = 1e-10

# Number of tokens that are multiplied at once; longer on a GPU, which multiplies a short chunk
# faster than it adds the n x n result to the total.
CHUNK = 256
CHUNK_ON_CUDA = 1024

# Compute capabilities of chips with at least half the float32 speed in float64.
FLOAT64_CHIPS = {(7, 0), (8, 0), (9, 0), (10, 0)}


def gram(x: Tensor, chunk: int | None = None, total: Tensor | None = None) -> Tensor:
    """Gram matrix X^T X, summed in float64 over chunks of tokens.

    Args:
        x: (N, n) activations, one token a row, any floating dtype.
        chunk: number of tokens multiplied at once; None: a value that suits the device.
        total: (n, n) float64 on the device of x, which is added to in place; None: zeros.

    Returns:
        (n, n) float64 on the device of x: `total`, if given.

    Raises:
        ValueError: x is not a matrix, total is not n x n in float64, or chunk is below 1.
    """
    return cross(x, x, chunk, total)


def cross(x: Tensor, y: Tensor, chunk: int | None = None, total: Tensor | None = None) -> Tensor:
    """Cross moment X^T Y, summed as precisely as in `gram`.

    Args:
        x: (N, n) activations, one token a row.
        y: (N, m) activations of the same tokens.
        chunk: as in `gram`.
        total: (n, m) float64, as in `gram`.

    Returns:
        (n, m) float64 on the device of x: `total`, if given.

    Raises:
        ValueError: x or y is not a matrix, their token counts differ, total is not n x m in
            float64, or chunk is below 1.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must be (tokens, ...), got {tuple(x.shape)}, {tuple(y.shape)}")
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
    """Matrix product X Y in the precision of `gram`, without autocast or TF32.

    Args:
        x: (p, q) of any floating dtype.
        y: (q, r).

    Returns:
        (p, r) without gradient; float64 if an input is, or if the chip is fast at it, else
        float32.
    """
    dtype = _precision(x, y)
    with exact_float32(x.device):
        return x.detach().to(dtype) @ y.detach().to(dtype)


def _precision(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype in which x and y are multiplied: float64 or float32."""
    wide = torch.float64 in (x.dtype, y.dtype)
    fast = x.is_cuda and torch.cuda.get_device_capability(x.device) in FLOAT64_CHIPS
    return torch.float64 if wide or fast else torch.float32


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products in full precision: no autocast, TF32 (CUDA) or bf16 (oneDNN).

    The switches for these are global to the process; the context restores them when it ends.
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


def has_data(values: Tensor) -> Tensor:
    """Mask of the eigenvalues of a Gram matrix that stem from data, not from rounding errors.

    An exact Gram matrix has no negative eigenvalue, so a negative one measures the rounding errors
    of this matrix. Eigenvalues that are not clearly larger count as errors, too.

    Args:
        values: (p,) eigenvalues, or singular values, in any order.

    Returns:
        (p,) bool; all False if no value is positive.
    """
    if values.numel() == 0:
        return values > 0
    floor = torch.maximum(NEGLIGIBLE * values.max(), -2 * values.min()).clamp(min=0)
    return values > floor
