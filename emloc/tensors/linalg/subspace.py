"""The factors of `eigen` by subspace iteration: matrix products and Cholesky factors only.

Shapes as in `factorize`: W (m, n), rank k, p = min(m, n), energy matrix K (p, p). The kept energy
depends on the space that the k directions span, not on the single directions, so the iteration need
not separate them. On a GPU a float64 product is many times faster than an eigendecomposition of a
matrix of the same size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emloc.tensors.linalg.factorize import (
    Factors,
    check,
    eigen,
    gram_of_columns,
    refit_to_v,
    times,
)
from emloc.tensors.linalg.gram import NEGLIGIBLE

# Below this size of K, one eigendecomposition costs no more than the iteration's small steps.
MIN_SIZE = 512

# Least size of K for each column of the block. On a GPU a wider block would leave hardly any gap,
# and its Cholesky factors would cost as much as an eigendecomposition. A CPU is as fast at
# eigendecompositions as at products: on two cores (AMD EPYC, sizes 576 to 2048) both take the same
# time at a rank of an eighth of the size, and the iteration twice as long at a quarter.
SIZE_PER_COLUMN, SIZE_PER_COLUMN_ON_GPU = 7, 2

# The iteration stops when the expected further gain is below this share of the tail energy. The
# spare columns converge last and count in it; the k directions are typically ten times closer.
TOLERANCE = 1e-3

# Factor on the expected gain, which assumes geometric convergence; the first steps are slower.
SAFETY = 2.0

# Maximum number of steps, still cheaper than an eigendecomposition; spectra of transformers take
# about ten.
MAX_STEPS = 40

# A tail below this share of the total energy is a rounding error, not worth minimising.
MIN_TAIL = 1e-9

# Largest accepted norm of a column of Q^T Q - I, as a root mean square, and the number of random
# vectors that estimate it. To compute Q^T Q would be one of seven products of a step.
DEFECT, PROBES = 1e-11, 8

# Largest accepted entry of Q^T Q - I for the basis of a tall W's columns.
TALL_DEFECT = 1e-8


@dataclass(frozen=True)
class _Subspace:
    """The state of a subspace iteration."""

    basis: Tensor | None  # (p, columns) orthonormal; None: the iteration failed
    small: Tensor  # basis^T K basis (columns, columns); empty if the iteration failed
    steps: int  # number of products with K


def subspace(
    weight: Tensor,
    rank: int,
    *,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    dtype: torch.dtype,
) -> Factors:
    """Low-rank factors nearly as good as those of `eigen`: at most 0.2 % more energy is lost.

    Block subspace iteration on K with spare columns, accelerated by Chebyshev's recurrence on the
    part of the spectrum below the block. It falls back on `eigen` if the iteration would not be
    faster, does not converge, or meets directions without data; `Factors.solver` tells which one
    succeeded. `Factors.spectrum` has only the k kept directions.

    Args:
        weight: (m, n).
        rank: k, from 1 to min(m, n).
        input_gram: (n, n) sum of x x^T over tokens; without any Gram C = I, a plain truncated SVD.
        output_gram: (m, m) sum of y y^T, y the outputs without bias; instead of `input_gram`.
        dtype: of the factors.

    Raises:
        ValueError: both Grams are given, a shape or the rank does not fit, or a value is not
            finite.
        torch.linalg.LinAlgError: the eigendecomposition of the fallback did not converge.
    """
    check(weight, rank, input_gram, output_gram)
    factors, steps = None, 0
    if _is_faster(weight, rank, output_gram):
        factors, steps = _factors_by_iteration(weight, rank, input_gram, output_gram, dtype)
    if factors is not None:
        return factors
    exact = eigen(weight, rank, input_gram=input_gram, output_gram=output_gram, dtype=dtype)
    return replace(exact, steps=steps)


def _width(rank: int) -> int:
    """Number of columns to iterate: the rank plus spare columns.

    Spare columns create a gap between the k leading directions and the rest of the spectrum, so the
    leading ones converge geometrically even where the spectrum is flat around k.
    """
    return rank + max(8, rank // 8)


def _is_faster(weight: Tensor, rank: int, output_gram: Tensor | None) -> bool:
    """Whether the iteration is likely to be faster than one eigendecomposition."""
    rows, columns = weight.shape
    size = min(rows, columns)
    # The output Gram of a tall W is no smaller than its input Gram, so this case does not occur in
    # practice and is not optimised.
    if output_gram is not None and rows > columns:
        return False
    least = SIZE_PER_COLUMN if weight.device.type == "cpu" else SIZE_PER_COLUMN_ON_GPU
    return size >= MIN_SIZE and least * _width(rank) <= size


def _factors_by_iteration(
    weight: Tensor,
    rank: int,
    input_gram: Tensor | None,
    output_gram: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Factors | None, int]:
    """The factors, or None if `eigen` has to compute them, and the number of steps."""
    gram = None if input_gram is None else input_gram.double()
    tall = weight.shape[0] > weight.shape[1]
    if tall:
        # R of W = Q R as a Cholesky factor of W^T W; a Householder QR would take far longer.
        lower, failed = torch.linalg.cholesky_ex(gram_of_columns(weight))
        if bool(failed):
            return None, 0
        core = lower.T
    else:
        core = weight.detach().double()
    if output_gram is not None:
        energy = output_gram.double()
    else:
        energy = core @ core.T if gram is None else core @ gram @ core.T
    total = float(energy.trace())
    if not total > 0:
        return None, 0
    # Scaled to a trace of p; the result is also a copy, which `_all_have_data` may overwrite.
    scaled = (energy + energy.T).mul_(energy.shape[0] / (2 * total))
    del energy
    leading = _leading_subspace(scaled, rank)
    if leading.basis is None or not _all_have_data(scaled, leading.small):
        return None, leading.steps
    u = leading.basis
    if tall:
        u = times(weight, torch.linalg.solve_triangular(core, u, upper=True))
        # W^T W lost digits; the basis itself shows whether too many.
        if not float(_defect(u)) < TALL_DEFECT:
            return None, leading.steps
    v = (leading.basis.T @ core).to(dtype)
    if output_gram is None:
        u = refit_to_v(weight, u, v, gram)
    kept_share = min(1.0, float(leading.small.trace()) / scaled.shape[0])
    # The iteration has nearly separated the columns into eigenvectors, so the diagonal is a good
    # estimate; exact eigenvalues are not worth their cost.
    spectrum = leading.small.diagonal().sort(descending=True).values * (total / scaled.shape[0])
    factors = Factors(u.to(dtype), v, kept_share, spectrum, rank, "subspace", leading.steps)
    return factors, leading.steps


def _leading_subspace(energy: Tensor, rank: int) -> _Subspace:
    """Nearly the space of the `rank` leading eigenvectors of energy (p, p), whose trace is p."""
    wide = _iterate(energy, _width(rank))
    if wide.basis is None:
        return wide
    leading = _leading_directions(wide.small, rank)
    if leading is None:
        return replace(wide, basis=None)
    return _Subspace(wide.basis @ leading, leading.T @ wide.small @ leading, wide.steps)


def _iterate(energy: Tensor, width: int) -> _Subspace:
    """A space of `width` columns that captures nearly the most energy that so many columns can.

    With b below the block's smallest eigenvalue, X_j+1 = (K - b/2) X_j - (b/4)^2 X_j-1 is
    Chebyshev's recurrence: it does not grow on [0, b] and grows fastest above. Each step multiplies
    both terms by the same inverse factor, which keeps the columns orthonormal and the recurrence
    valid.
    """
    size = energy.shape[0]
    generator = torch.Generator(energy.device).manual_seed(0)
    start = torch.randn(size, width, generator=generator, dtype=energy.dtype, device=energy.device)
    basis, _ = _orthonormalize(energy @ start)
    previous_basis, edge = torch.zeros_like(basis), energy.new_zeros(())
    captured, gain = 0.0, math.inf
    for step in range(1, MAX_STEPS + 1):
        image = energy @ basis
        # The trace of basis^T K basis, without the product.
        last, captured = captured, float(torch.dot(basis.flatten(), image.flatten()))
        tail = size - captured
        if tail < MIN_TAIL * size:
            return _Subspace(None, basis.new_empty(0), step)
        previous_gain, gain = gain, max(captured - last, 0.0)
        # The first gain starts from zero energy, and a ratio needs two further gains.
        if step > 2 and SAFETY * _further_gain(gain, previous_gain) < TOLERANCE * tail:
            return _Subspace(basis, basis.T @ image, step)
        image -= edge / 2 * basis + (edge / 4).square() * previous_basis
        next_basis, inverse = _orthonormalize(image)
        basis, previous_basis = next_basis, basis @ inverse
        # The growth of the block's weakest direction in this step yields its eigenvalue.
        growth = _largest_eigenvalue(inverse @ inverse.T).rsqrt()
        smallest = edge / 2 + growth + (edge / 4).square() / growth
        edge = torch.maximum(edge, 0.95 * smallest)
    return _Subspace(None, basis.new_empty(0), MAX_STEPS)


def _further_gain(gain: float, previous_gain: float) -> float:
    """Sum of all future gains, if they continue as a geometric series."""
    # At least 0.75: strong directions converge at once and hide how slowly weak ones follow.
    ratio = min(max(gain / previous_gain, 0.75), 0.98) if previous_gain > 0 else 0.75
    return gain * ratio / (1 - ratio)


def _leading_directions(small: Tensor, rank: int) -> Tensor | None:
    """Orthonormal basis (columns, rank) of the leading directions of `small`; None if singular.

    The few directions to leave out are found first: a power of the inverse amplifies them.
    """
    lower, failed = torch.linalg.cholesky_ex(small)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    edge = small.diagonal().sort(descending=True).values[rank - 1]
    spread = max(float(edge * _largest_eigenvalue(inverse)), 1.0 + 1e-9)
    # The highest power of two whose range over the eigenvalues to leave out fits into float64.
    doublings = int(min(4.0, max(0.0, math.log2(math.log(1e6) / math.log(spread)))))
    for _ in range(doublings):
        inverse = inverse @ inverse
        inverse /= inverse.norm()
    identity = torch.eye(small.shape[0], dtype=small.dtype, device=small.device)
    spare = identity[:, rank:]
    for _ in range(8):
        spare, _ = _orthonormalize(inverse @ spare)
    return _orthonormalize(identity[:, :rank] - spare @ spare[:rank].T)[0]


def _all_have_data(energy: Tensor, small: Tensor) -> bool:
    """Whether all directions of `small` have data, by the rule of `has_data`; changes `energy`."""
    lower, failed = torch.linalg.cholesky_ex(small)
    smallest = 1 / _largest_eigenvalue(torch.cholesky_inverse(lower))
    if bool(failed) or not bool(smallest > NEGLIGIBLE * small.norm()):
        return False
    # Positive definite after this shift means: no negative eigenvalue is below -smallest / 2.
    energy.diagonal().add_(smallest / 2)
    return not bool(torch.linalg.cholesky_ex(energy).info)


def _orthonormalize(y: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal Q (p, columns) of the columns of y, and the upper triangular S with Q = y S.

    By Cholesky factors of Gram matrices. One pass is not precise enough for columns of very
    different norms, so the passes repeat; if they fail, Householder's QR replaces them.
    """
    identity = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    generator = torch.Generator(y.device).manual_seed(0)
    probes = y.new_empty(y.shape[1], PROBES).normal_(generator=generator)
    q, inverse = y, identity
    for _ in range(3):
        lower = torch.linalg.cholesky_ex(q.T @ q).L
        step = torch.linalg.solve_triangular(lower, identity, upper=False).T
        q, inverse = q @ step, inverse @ step
        # A failed Cholesky factor shows in the defect, too; this saves a second synchronisation
        # with the device.
        defect = float((q.T @ (q @ probes) - probes).norm()) / len(probes) ** 0.5 / PROBES**0.5
        if defect < DEFECT:
            return q, inverse
        if not defect < 1:
            break
    q, upper = torch.linalg.qr(y)
    return q, torch.linalg.solve_triangular(upper, identity, upper=True)


def _defect(q: Tensor) -> Tensor:
    """Largest absolute entry of Q^T Q - I, which is 0 for orthonormal columns."""
    difference = q.T @ q
    difference.diagonal().sub_(1)
    return difference.abs().max()


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Upper bound of the largest eigenvalue of a positive definite matrix, at most 2.4 times it."""
    size = matrix.norm()
    power = matrix / size
    for _ in range(2):
        power = power @ power
    return size * power.norm() ** 0.25
