"""Refit a layer's weight to inputs that changed, because earlier layers were compressed.

Shapes: N tokens, W (m, n), inputs X (N, n) in the original model and X' (N, n) in the compressed
model, C' = X'^T X' (n, n), drift D = (X - X')^T X' (n, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the mean diagonal of C'. Measured on the first blocks of SmolLM2-135M (1,733 tokens,
# half the parameters): the error on calibration tokens is the same for ridges from 1e-6 to 1e-2,
# while that on held-out tokens grows below 1e-2. At 1e-1 that on calibration tokens grows, too.
RIDGE = 1e-2


def regress_weight(weight: Tensor, input_gram: Tensor, drift: Tensor) -> Tensor:
    """Least-squares weight M that maps the new inputs X' to the original outputs X W^T.

    M = W + W D (C' + eps I)^-1 minimises ||X W^T - X' M^T||^2 + eps ||W - M||^2. Without drift,
    M = W; and M equals W in directions of X' without data. The best rank-k approximation of M under
    C' is the reduced-rank regression of the original outputs on the new inputs.

    Args:
        weight: W (m, n).
        input_gram: C' (n, n) float64.
        drift: D (n, n) float64, summed from differences X - X'. As a difference of X^T X' and C', a
            small drift would consist of rounding errors.

    Returns:
        (m, n) float64.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    size = (weight.shape[1],) * 2
    if input_gram.shape != size or drift.shape != size:
        shapes = [tuple(item.shape) for item in (weight, input_gram, drift)]
        raise ValueError(f"need weight (m, n), input_gram (n, n), drift (n, n), got {shapes}")
    if not all(bool(item.isfinite().all()) for item in (weight, input_gram, drift)):
        raise ValueError("weight, input_gram or drift holds values that are not finite")
    w, scale = weight.detach().double(), float(input_gram.diagonal().mean())
    if not scale > 0:
        return w
    error, gram = w @ drift, (input_gram + input_gram.T) / 2
    ridged = gram.clone()
    ridged.diagonal().add_(RIDGE * scale)
    lower, failed = torch.linalg.cholesky_ex(ridged)
    if not bool(failed):
        return w + torch.cholesky_solve(error.T, lower).T
    # Next to a very strong direction, a rounding error can be negative and exceed the ridge.
    values, vectors = torch.linalg.eigh(gram)
    return w + (error @ vectors / (values.clamp(min=0) + RIDGE * scale)) @ vectors.T
