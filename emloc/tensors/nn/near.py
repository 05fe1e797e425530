"""Whether two ways to compute a tensor are the same, up to rounding."""

from __future__ import annotations

from torch import Tensor

# Relative difference of two tensors that rounding to 16 bits can cause, with a margin.
ROUNDING = 0.01


def is_near(actual: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor differs from an expected one by no more than rounding can cause."""
    reference = expected.float()
    return bool((actual.float() - reference).norm() <= ROUNDING * reference.norm())
