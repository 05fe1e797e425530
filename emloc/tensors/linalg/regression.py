"""The weight a layer should have where its inputs are no longer those of the original model.

Shapes: N tokens, W (m, n), inputs X (N, n) in the original and X' (N, n) behind layers that were
compressed, C' = X'^T X' (n, n), drift D = (X - X')^T X' (n, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean diagonal of C'. What the calibration tokens gain with less is not for others: on the
# first blocks of SmolLM2-135M (1,733 tokens, half the parameters) they gain as much from 1e-6 to
# 1e-2, and held-out tokens less and less below. A tenth takes away from the calibration tokens too.
RIDGE = 1e-2


def regressed(weight: Tensor, input_gram: Tensor, drift: Tensor) -> Tensor:
    """The M that makes of the new inputs what W makes of the original ones (least squares).

    M = W + W D (C' + eps I)^-1 minimises ||X W^T - X' M^T||^2 + eps ||W - M||^2: without drift it
    is W itself, and a direction of X' without data leaves W as it is. Its best rank-k replacement
    under C' is the reduced-rank regression of the original outputs on the new inputs.

    Args:
        weight: (m, n).
        input_gram: C', float64.
        drift: D, float64. Summed as it stands: the difference of X^T X' and C' would be rounding
            where the drift is small.

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
    missing, gram = w @ drift, (input_gram + input_gram.T) / 2
    ridged = gram.clone()
    ridged.diagonal().add_(RIDGE * scale)
    lower, failed = torch.linalg.cholesky_ex(ridged)
    if not bool(failed):
        return w + torch.cholesky_solve(missing.T, lower).T
    # Beside a direction strong enough, the rounding of a sum can be above the ridge, and negative.
    values, vectors = torch.linalg.eigh(gram)
    return w + (missing @ vectors / (values.clamp(min=0) + RIDGE * scale)) @ vectors.T
