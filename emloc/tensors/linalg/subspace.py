"""The factors of `eigen` without its eigen-decomposition: products and Cholesky factors only.

Shapes as in `factorize`: W (m, n), rank k, p = min(m, n), energy matrix K (p, p). What is kept
depends on the space the k directions span, not on the directions themselves, so a block subspace
iteration need not tell them apart. On a GPU a float64 product is many times faster than a
decomposition of the same matrix.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emloc.tensors.linalg.factorize import Factors, check, eigen, rounded
from emloc.tensors.linalg.gram import NEGLIGIBLE

# Below this size one decomposition costs no more than the iteration's many small steps.
SMALL = 512

# Of the tail energy: what the block may still gain when the iteration stops. The spare columns
# converge last and are in it, so the k directions taken are typically ten times nearer.
TOLERANCE = 1e-3

# Gains fall like a power of the step before they fall geometrically, as the estimate assumes.
SAFETY = 2.0

# Still cheaper than a decomposition; transformer-like spectra take about ten.
STEPS = 40

# Of the total energy: a smaller tail is rounding, not something to minimise.
NOTHING_LEFT = 1e-9

# Largest entry of Q^T Q - I allowed: in the iteration, and in the basis of a tall W's columns.
DEFECT, TALL_DEFECT = 1e-11, 1e-8


@dataclass(frozen=True)
class _Block:
    """Where an iteration stands."""

    space: Tensor | None  # (p, columns) orthonormal; None: not for this method
    small: Tensor  # K within the space
    steps: int


def subspace(
    weight: Tensor,
    rank: int,
    *,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    dtype: torch.dtype,
) -> Factors:
    """What `eigen` returns, losing at most 0.2 % more energy and knowing less of the spectrum.

    Block subspace iteration on K with spare columns, accelerated by Chebyshev's recurrence on the
    part of the spectrum below the block. `eigen` itself answers where the iteration cannot be
    faster, does not converge, or would have to fill directions without data; `solver` says so.

    Args:
        weight: (m, n).
        rank: k, from 1 to min(m, n).
        input_gram: (n, n) sum of x x^T; without either Gram C = I, a plain truncated SVD.
        output_gram: (m, m) sum of y y^T, y the outputs without bias; instead of `input_gram`.
        dtype: of the factors.

    Raises:
        ValueError: both Grams are given, a shape or the rank does not fit, or a value is not
            finite.
        torch.linalg.LinAlgError: the decomposition `eigen` falls back on did not converge.
    """
    check(weight, rank, input_gram, output_gram)
    found, steps = None, 0
    if _suits(weight, rank, output_gram):
        found, steps = _iterated(weight, rank, input_gram, output_gram, dtype)
    if found is not None:
        return found
    exact = eigen(weight, rank, input_gram=input_gram, output_gram=output_gram, dtype=dtype)
    return replace(exact, steps=steps)


def _width(rank: int) -> int:
    # Spare columns: with them the k leading directions are a gap away from what is left out, so
    # they converge geometrically even where the spectrum is flat around k.
    return rank + max(8, rank // 8)


def _suits(weight: Tensor, rank: int, output_gram: Tensor | None) -> bool:
    rows, columns = weight.shape
    size = min(rows, columns)
    # Outputs of a tall W are no smaller than its inputs, so nobody gathers them for speed.
    if output_gram is not None and rows > columns:
        return False
    # A block of half the space leaves hardly a gap, and its own Cholesky factors cost as much.
    return size >= SMALL and 2 * _width(rank) <= size


def _iterated(
    weight: Tensor,
    rank: int,
    input_gram: Tensor | None,
    output_gram: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Factors | None, int]:
    """The factors and the steps taken; no factors where the exact method has to answer."""
    w = weight.detach().double()
    gram = None if input_gram is None else input_gram.double()
    tall = w.shape[0] > w.shape[1]
    core = w
    if tall:
        # The R of W = Q R, from W^T W: a Householder QR would take longer than all the rest.
        lower, failed = torch.linalg.cholesky_ex(w.T @ w)
        if bool(failed):
            return None, 0
        core = lower.T
    if output_gram is not None:
        energy = output_gram.double()
    else:
        energy = core @ core.T if gram is None else core @ gram @ core.T
    total = float(energy.trace())
    if not total > 0:
        return None, 0
    # A mean energy of one; also a copy, which `_supported` may change.
    scaled = (energy + energy.T).mul_(energy.shape[0] / (2 * total))
    del energy
    block = _leading(scaled, rank)
    if block.space is None or not _supported(scaled, block.small):
        return None, block.steps
    u = block.space
    if tall:
        u = w @ torch.linalg.solve_triangular(core, u, upper=True)
        # Squaring W cost digits: only the basis itself says whether too many.
        if not float(_defect(u)) < TALL_DEFECT:
            return None, block.steps
    v = (block.space.T @ core).to(dtype)
    if output_gram is None:
        u = rounded(w, u, v, gram)
    kept = min(1.0, float(block.small.trace()) / scaled.shape[0])
    # Iterated on, the columns have all but sorted themselves into eigenvectors, so that telling
    # them apart would cost more than it says.
    spectrum = block.small.diagonal().sort(descending=True).values * (total / scaled.shape[0])
    return Factors(u.to(dtype), v, kept, spectrum, rank, "subspace", block.steps), block.steps


def _leading(energy: Tensor, rank: int) -> _Block:
    """Nearly the `rank` leading directions of energy (p, p), whose trace is p."""
    block = _converged(energy, _width(rank))
    if block.space is None:
        return block
    chosen = _chosen(block.small, rank)
    if chosen is None:
        return replace(block, space=None)
    return _Block(block.space @ chosen, chosen.T @ block.small @ chosen, block.steps)


def _converged(energy: Tensor, width: int) -> _Block:
    """A block whose columns together miss next to nothing of what as many could capture.

    With b below the block's least eigenvalue, X_j+1 = (K - b/2) X_j - (b/4)^2 X_j-1 is Chebyshev's
    recurrence: it does not grow on [0, b] and grows fastest above. Each step multiplies both terms
    by the same inverse factor, so the columns stay orthonormal and the recurrence intact.
    """
    size = energy.shape[0]
    generator = torch.Generator(energy.device).manual_seed(0)
    start = torch.randn(size, width, generator=generator, dtype=energy.dtype, device=energy.device)
    space, _ = _orthonormal(energy @ start)
    before, edge = torch.zeros_like(space), energy.new_zeros(())
    captured, gain = 0.0, math.inf
    for step in range(1, STEPS + 1):
        image = energy @ space
        small = space.T @ image
        last, captured = captured, float(small.trace())
        tail = size - captured
        if tail < NOTHING_LEFT * size:
            return _Block(None, small, step)
        previous, gain = gain, max(captured - last, 0.0)
        # The first gain is of an empty block, and a ratio takes two gains.
        if step > 2 and SAFETY * _ahead(gain, previous) < TOLERANCE * tail:
            return _Block(space, small, step)
        image -= edge / 2 * space + (edge / 4).square() * before
        ready, inverse = _orthonormal(image)
        space, before = ready, space @ inverse
        # What the recurrence did to the block's least direction, turned back into its eigenvalue.
        growth = _largest(inverse @ inverse.T).rsqrt()
        least = edge / 2 + growth + (edge / 4).square() / growth
        edge = torch.maximum(edge, 0.95 * least)
    return _Block(None, small, STEPS)


def _ahead(gain: float, previous: float) -> float:
    """The sum of all gains to come, were each to the one before as these two are."""
    # Strong directions settle at once and hide how slowly their weak neighbours follow.
    ratio = min(max(gain / previous, 0.75), 0.98) if previous > 0 else 0.75
    return gain * ratio / (1 - ratio)


def _chosen(small: Tensor, rank: int) -> Tensor | None:
    """(columns, rank) orthonormal, the leading directions of small; None where it is singular.

    The few directions to leave out are those a power of the inverse makes largest.
    """
    lower, failed = torch.linalg.cholesky_ex(small)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    edge = small.diagonal().sort(descending=True).values[rank - 1]
    spread = max(float(edge * _largest(inverse)), 1.0 + 1e-9)
    # As high a power as float64 holds over the eigenvalues to be left out.
    doublings = int(min(4.0, max(0.0, math.log2(math.log(1e6) / math.log(spread)))))
    for _ in range(doublings):
        inverse = inverse @ inverse
        inverse /= inverse.norm()
    whole = torch.eye(small.shape[0], dtype=small.dtype, device=small.device)
    spare = whole[:, rank:]
    for _ in range(8):
        spare, _ = _orthonormal(inverse @ spare)
    return _orthonormal(whole[:, :rank] - spare @ spare[:rank].T)[0]


def _supported(energy: Tensor, small: Tensor) -> bool:
    """Whether all directions of small are data in energy, as `supported` in `gram` has it.

    Spoils energy.
    """
    lower, failed = torch.linalg.cholesky_ex(small)
    least = 1 / _largest(torch.cholesky_inverse(lower))
    if bool(failed) or not bool(least > NEGLIGIBLE * small.norm()):
        return False
    # Positive definite after the shift: twice the most negative eigenvalue is below `least`.
    energy.diagonal().add_(least / 2)
    return not bool(torch.linalg.cholesky_ex(energy).info)


def _orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    """Q (p, columns) and the upper triangular inverse, y times which is Q.

    By Cholesky factors of Gram matrices; a second pass repairs what a first one over very unequal
    columns leaves, and Householder's QR takes over where that is not enough.
    """
    whole = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    q, inverse = y, whole
    for _ in range(3):
        lower = torch.linalg.cholesky_ex(q.T @ q).L
        step = torch.linalg.solve_triangular(lower, whole, upper=False).T
        q, inverse = q @ step, inverse @ step
        # A failed factor shows here too, which saves waiting for the device twice.
        defect = float(_defect(q))
        if defect < DEFECT:
            return q, inverse
        if not defect < 1:
            break
    q, upper = torch.linalg.qr(y)
    return q, torch.linalg.solve_triangular(upper, whole, upper=True)


def _defect(q: Tensor) -> Tensor:
    """The largest entry of Q^T Q - I."""
    gap = q.T @ q
    gap.diagonal().sub_(1)
    return gap.abs().max()


def _largest(matrix: Tensor) -> Tensor:
    """The largest eigenvalue of a positive definite matrix from above, at most 2.4 times."""
    size = matrix.norm()
    power = matrix / size
    for _ in range(2):
        power = power @ power
    return size * power.norm() ** 0.25
