"""Second-moment sums over tokens, precise enough to be decomposed afterwards.

Shapes: N tokens, n and m features; x (N, n), y (N, m), gram (n, n), cross (n, m).

Transformer activations have a few directions hundreds of times stronger than the rest. A float32
sum over all tokens loses the weak directions beside them, so only the products of one short chunk
of tokens are float32 and the chunks are added up in float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Eigenvalues this far below the largest are rounding, not data.
NEGLIGIBLE = 1e-10


def gram(x: Tensor, chunk: int = 256) -> Tensor:
    """X^T X, summed in float64 over chunks of tokens.

    Products are float32, or float64 where x is; neither autocast nor TF32 touches them.

    Args:
        x: (N, n) activations, one token a row, any floating dtype.
        chunk: tokens multiplied at once.

    Returns:
        (n, n) float64 on the device of x.

    Raises:
        ValueError: x is not a matrix or chunk is below 1.
    """
    return cross(x, x, chunk)


def cross(x: Tensor, y: Tensor, chunk: int = 256) -> Tensor:
    """X^T Y by the same precision rule as `gram`.

    Args:
        x: (N, n) activations, one token a row.
        y: (N, m) activations of the same tokens.
        chunk: tokens multiplied at once.

    Returns:
        (n, m) float64 on the device of x.

    Raises:
        ValueError: x or y is not a matrix, their token counts differ, or chunk is below 1.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"need (tokens, features) twice, got {tuple(x.shape)}, {tuple(y.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    wide = torch.float64 in (x.dtype, y.dtype)
    dtype = torch.float64 if wide else torch.float32
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    with exact_float32(x.device):
        for start in range(0, x.shape[0], chunk):
            left, right = (item.detach()[start : start + chunk].to(dtype) for item in (x, y))
            total += left.T @ right
    return total


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
