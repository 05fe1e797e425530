"""Weigh the outputs of a layer by how much the loss depends on them.

Shapes: N tokens, m outputs. For gradients g (N, m) of the loss with respect to the outputs of a
layer, an error E of its outputs changes the loss by the sum of g E to first order. The mean square
of that change is |R E|^2 with G = R^T R and G = E[g g^T]: factors that minimise |R (W - u v) C^1/2|
keep what the loss depends on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emloc.tensors.linalg.gram import gram

# Share of the mean diagonal of G that is added to it: so much a direction counts at least.
DAMPING = 1e-3
# Tokens that are multiplied at once.
CHUNK = 2048


def output_root(gradients: Tensor) -> Tensor | None:
    """Return R (m, m) float64, upper triangular, with R^T R = G and a mean diagonal of G of 1.

    None if all gradients are zero, so that no output matters more than another.

    Args:
        gradients: (N, m), of any scale.
    """
    largest = gradients.abs().max()
    if not largest > 0:
        return None
    # Sums of float32 over long chunks are precise enough for weights.
    total = gram(gradients / largest, chunk=CHUNK)
    total /= total.diagonal().mean()
    total.diagonal().add_(DAMPING)
    upper: Tensor = torch.linalg.cholesky(total, upper=True)
    return upper


def unweighted(root: Tensor, u: Tensor) -> Tensor:
    """Return R^-1 u (m, k) float64, for factors u (m, k) of a weight R W."""
    solution: Tensor = torch.linalg.solve_triangular(root, u.double(), upper=True)
    return solution
