"""Round a matrix row by row, so that rows not yet rounded make up for the errors of earlier ones.

This is GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023, section 3), which knows what the rows are multiplied by. Shapes: X (n, m) is
the matrix, A (N, n) what it is multiplied by from the left, and G = A^T A (n, n). Rounding X to Q
costs ||A (X - Q)||^2. If row i is rounded with the error e, this cost is least for later rows
j > i that change by -U[i, j] / U[i, i] e, where U is upper triangular and U^T U = G^-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the diagonal of G, as a share of its mean. It bounds what later rows are changed by in
# directions that A lacks.
DAMPING = 0.01

# Rows whose errors are applied to all later rows in one product.
SPAN = 64

# Rounds a row (m,), given its index; returns the rounded row.
Round = Callable[[int, Tensor], Tensor]


def feed_errors(matrix: Tensor, gram: Tensor, round_row: Round) -> None:
    """Round the rows of a matrix one after another, each with the errors of the rows before it.

    The rows with the most energy in G are rounded first, since all others can make up for their
    errors. On SmolLM2-135M in two bits this order lowers the loss far more than the squared errors
    of the layers (6.4 to 3.0 nats).

    Args:
        matrix: X (n, m).
        gram: G (n, n), of any scale.
        round_row: called once for each row; it keeps what it needs of the result.

    Raises:
        ValueError: the Gram has another shape, or its values are not finite.
    """
    count = len(matrix)
    if gram.shape != (count, count):
        raise ValueError(f"need a Gram ({count}, {count}), got {tuple(gram.shape)}")
    order = gram.diagonal().argsort(descending=True)
    factor = inverse_root(gram[order][:, order])
    work = matrix.detach()[order].float()
    # Copied to the host at once, not number by number.
    indices, diagonal = order.tolist(), factor.diagonal().tolist()
    for start in range(0, count, SPAN):
        stop = min(start + SPAN, count)
        rows = work[start:stop]
        errors = torch.empty_like(rows)
        for offset in range(stop - start):
            place = start + offset
            row = rows[offset]
            torch.sub(row, round_row(indices[place], row), out=errors[offset])
            errors[offset] /= diagonal[place]
            rows[offset + 1 :].addr_(factor[place, place + 1 : stop], errors[offset], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular U (n, n) with U^T U = (G + damping)^-1, in float32 on G's device.

    If G has the Cholesky factor R R^T with an upper triangular R, then U = R^-1. So no inverse of
    G is computed, and float32 is precise enough for almost every G. Otherwise float64 is used. A G
    for which the device has too little memory is factored on the host.

    Raises:
        ValueError: a value of G is not finite.
    """
    scale = gram.diagonal().double().mean()
    if not bool(scale.isfinite()):
        raise ValueError("the Gram holds values that are not finite")
    try:
        return _inverse_root(gram, float(scale) or 1.0)
    except torch.OutOfMemoryError:
        return _inverse_root(gram.cpu(), float(scale) or 1.0).to(gram.device)


def _inverse_root(gram: Tensor, scale: float) -> Tensor:
    for dtype in (torch.float32, torch.float64):
        # With rows and columns in reverse order, the lower factor is the upper one.
        damped = (gram / scale).to(dtype).flip(0, 1)
        damped.diagonal().add_(DAMPING)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper = lower.flip(0, 1)
            unit = torch.eye(len(gram), dtype=dtype, device=gram.device)
            return torch.linalg.solve_triangular(upper, unit, upper=True, out=unit).float()
    raise ValueError("the Gram is not positive semidefinite")
