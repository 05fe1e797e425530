"""Low-rank factors of a linear layer that keep the most of its output energy.

Shapes: weight W (m, n) as torch stores it (out, in), rank k, factors u (m, k) and v (k, n) with
W ~ u v, input Gram C = X^T X (n, n), output Gram K = W C W^T (m, m) of outputs without bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.tensors.linalg.gram import NEGLIGIBLE, exact_float32, supported

# Of the mean diagonal: far below any direction worth re-solving, far above float64 rounding.
RIDGE = 1e-8

# The reference implementation's floor for eigenvalues of the trace-normalised Gram.
WHITEN_FLOOR = 1e-7


@dataclass(frozen=True)
class Factors:
    """u (m, k) and v (k, n) of one layer, and the spectrum they were cut from."""

    u: Tensor
    v: Tensor
    kept: float  # share of the output energy ||W C^1/2||^2 in the k directions taken, in [0, 1]
    # (min(m, n),) float64, descending: output energy of every direction. Where none was decomposed
    # only of the k taken, (k,): they add up, and each is within some per cent of its eigenvalue.
    spectrum: Tensor
    seen: int  # leading columns of u chosen by data; the remaining k - seen only approximate W
    solver: str  # eigen, subspace or whiten: what found them, whatever was asked for
    steps: int = 0  # products with K of a subspace iteration; with solver eigen, spent in vain


def rank_of(ratio: float, rows: int, columns: int, multiple: int = 1) -> int:
    """The largest rank whose two factors hold at most `ratio` of the weight's parameters.

    Args:
        ratio: share of the parameters to keep, in (0, 1).
        rows: m, output features.
        columns: n, input features.
        multiple: round the rank down to a multiple of this.

    Returns:
        k with k (m + n) <= ratio m n.

    Raises:
        ValueError: ratio or multiple is out of range, or the budget does not pay for one rank.
    """
    if not 0 < ratio < 1 or multiple < 1:
        raise ValueError(f"need 0 < ratio < 1 and multiple >= 1, got {ratio} and {multiple}")
    # Python's float floor division is exact, so rounding cannot exceed the budget.
    rank = int(ratio * rows * columns // (rows + columns))
    rank -= rank % multiple
    if rank == 0:
        raise ValueError(
            f"ratio {ratio} of a {rows} x {columns} weight leaves rank 0 (multiple {multiple})"
        )
    return rank


def eigen(
    weight: Tensor,
    rank: int,
    *,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    dtype: torch.dtype,
) -> Factors:
    """The best rank-k replacement of a layer on its calibration tokens (EMLoC, stage 1).

    By Eckart-Young no rank-k matrix is closer to W in ||(W - W_k) C^1/2|| than U U^T W, with U the
    leading eigenvectors of W C W^T: the layer followed by a projection on the principal components
    of its outputs. Where C is invertible this is the whitened SVD (see `whiten`), but it needs
    neither a root nor an inverse of C. One float64 eigen-decomposition of size min(m, n).

    Directions without data are filled with those that lose the least of W itself. v is rounded
    first; u is solved again against the rounded v where C is known. From `output_gram` alone u is
    only rounded: a second pass over the tokens and `refit` improve it.

    Args:
        weight: (m, n).
        rank: k, from 1 to min(m, n).
        input_gram: (n, n) sum of x x^T; without either Gram C = I, a plain truncated SVD.
        output_gram: (m, m) sum of y y^T, y the outputs without bias; instead of `input_gram`.
        dtype: of the factors.

    Raises:
        ValueError: both Grams are given, a shape or the rank does not fit, or a value is not
            finite.
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    check(weight, rank, input_gram, output_gram)
    w = weight.detach().double()
    gram = None if input_gram is None else input_gram.double()
    basis, core, energy = energies(w, gram, output_gram)
    values, vectors = torch.linalg.eigh(energy)
    values, vectors = values.flip(0), vectors.flip(1)
    seen = int(supported(values)[:rank].sum())
    left = _filled(core, vectors, rank, seen)
    u = left if basis is None else basis @ left
    v = (u.T @ w).to(dtype)
    if output_gram is None:
        u = rounded(w, u, v, gram)
    spectrum = values.clamp(min=0)
    return Factors(u.to(dtype), v, _share(spectrum, rank), spectrum, seen, "eigen")


def energies(
    w: Tensor, gram: Tensor | None, output_gram: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """W = Q R and the energy matrix R C R^T: Q or None for I, R, and that (min(m, n),) * 2.

    Takes what `eigen` does, in float64.
    """
    # A tall W acts within its own column space, so work there: the decomposition is n x n.
    basis, core = torch.linalg.qr(w) if w.shape[0] > w.shape[1] else (None, w)
    if output_gram is not None:
        outputs = output_gram.double()
        energy = outputs if basis is None else basis.T @ outputs @ basis
    else:
        energy = core @ core.T if gram is None else core @ gram @ core.T
    return basis, core, (energy + energy.T) / 2


def rounded(w: Tensor, u0: Tensor, v: Tensor, input_gram: Tensor | None) -> Tensor:
    """The u that makes the best of a v that was rounded (see `refit`).

    Args:
        w: (m, n) float64.
        u0: (m, k) float64 that belongs to v before rounding.
        v: (k, n) rounded.
        input_gram: (n, n) float64; None for C = I.

    Returns:
        (m, k) float64.
    """
    exact = v.double()
    z = exact if input_gram is None else exact @ input_gram
    return refit(w @ z.T, z @ exact.T, u0)


def refit(yz: Tensor, zz: Tensor, u0: Tensor) -> Tensor:
    """The u that best maps the hidden features z = v x to the outputs y (least squares).

    Solved for the step away from u0 with a tiny ridge, so the squared error never exceeds that of
    u0, and a direction of z without data leaves u0 as it is.

    Args:
        yz: (m, k) sum of y z^T over tokens, y the outputs of the original layer without bias.
        zz: (k, k) sum of z z^T over the same tokens.
        u0: (m, k) to start from, of any dtype.

    Returns:
        (m, k) float64.

    Raises:
        ValueError: the shapes do not fit.
    """
    if yz.shape != u0.shape or zz.shape != (u0.shape[1], u0.shape[1]):
        shapes = [tuple(item.shape) for item in (yz, zz, u0)]
        raise ValueError(f"need yz (m, k), zz (k, k), u0 (m, k), got {shapes}")
    start, gram = u0.detach().double(), zz.double()
    missing = yz.double() - start @ gram
    step = _solved(missing, (gram + gram.T) / 2)
    if step is not None:
        return start + step
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    solid = supported(values)
    if not solid.any():
        return start
    inverse = solid / (values.clamp(min=0) + RIDGE * values.clamp(min=0).mean())
    return start + (missing @ vectors * inverse) @ vectors.T


def whiten(weight: Tensor, rank: int, input_gram: Tensor, *, dtype: torch.dtype) -> Factors:
    """The factors as the authors' implementation computes them, to compare with (EMLoC, stage 1).

    All in float32: S with S S^T = C from an eigen-decomposition with clamped eigenvalues, an SVD of
    W S, an inverse of S, and the singular values split evenly between u and v.

    Args:
        weight: (m, n).
        rank: k, from 1 to min(m, n).
        input_gram: (n, n) sum of x x^T.
        dtype: of the factors.

    Raises:
        ValueError: a shape or the rank does not fit, a value is not finite, or C is zero.
        torch.linalg.LinAlgError: a decomposition did not converge or S is singular.
    """
    check(weight, rank, input_gram, None)
    w, gram = weight.detach().float(), input_gram.float()
    scale = gram.diagonal().mean()
    if not scale > 0:
        raise ValueError(f"input_gram must have a positive trace, got mean {float(scale)}")
    with exact_float32(w.device):
        values, vectors = torch.linalg.eigh(gram / scale)
        root = vectors * (values.clamp(min=WHITEN_FLOOR) * scale).sqrt()
        left, sigma, right = torch.linalg.svd(w @ root, full_matrices=False)
        half = sigma[:rank].sqrt()
        v = half[:, None] * (right[:rank] @ torch.linalg.inv(root))
    spectrum = sigma.double().square()
    u = left[:, :rank] * half
    return Factors(u.to(dtype), v.to(dtype), _share(spectrum, rank), spectrum, rank, "whiten")


def lost(weight: Tensor, factors: Factors, input_gram: Tensor | None = None) -> float:
    """Share of the output energy the factors lose: ||(W - u v) C^1/2||^2 / ||W C^1/2||^2.

    Args:
        weight: (m, n).
        factors: of this weight.
        input_gram: (n, n); None for C = I.

    Returns:
        At least 0 up to rounding; 0 where the layer has no output energy to lose.
    """
    w = weight.detach().double()
    gap = w - factors.u.double() @ factors.v.double()
    total, left = _energy(w, input_gram), _energy(gap, input_gram)
    return left / total if total > 0 else 0.0


def _solved(missing: Tensor, gram: Tensor) -> Tensor | None:
    """missing (gram + ridge)^-1 by Cholesky; None where a direction of gram may have no data."""
    # Still positive definite below `supported`'s floor (the norm bounds the largest eigenvalue):
    # every direction is solid, and the decomposition that would sort them out is not needed.
    lowered, ridged = gram.clone(), gram.clone()
    lowered.diagonal().sub_(NEGLIGIBLE * gram.norm())
    lower, failed = torch.linalg.cholesky_ex(lowered)
    # A NaN is not greater than zero, so broken numbers take the path that refuses them.
    if not bool((failed == 0) & (lower[-1, -1] > 0)):
        return None
    ridged.diagonal().add_(RIDGE * gram.diagonal().mean())
    lower = torch.linalg.cholesky_ex(ridged).L
    return torch.cholesky_solve(missing.T, lower).T


def _energy(w: Tensor, gram: Tensor | None) -> float:
    return float(((w if gram is None else w @ gram.double()) * w).sum())


def _share(spectrum: Tensor, rank: int) -> float:
    total = float(spectrum.sum())
    return float(spectrum[:rank].sum()) / total if total > 0 else 1.0


def _filled(core: Tensor, vectors: Tensor, rank: int, seen: int) -> Tensor:
    """The `seen` leading vectors, then those of their complement that hold the most of W."""
    if seen == rank:
        return vectors[:, :rank]
    # The complement's basis comes for free, so the fill is orthogonal to what is kept even where
    # W has nothing left to offer.
    spare = vectors[:, seen:]
    rest = spare.T @ core
    best = torch.linalg.eigh(rest @ rest.T).eigenvectors.flip(1)[:, : rank - seen]
    return torch.cat([vectors[:, :seen], spare @ best], dim=1)


def check(weight: Tensor, rank: int, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Refuse what no solver can factorise.

    Args:
        weight: should be (m, n).
        rank: should be from 1 to min(m, n).
        inputs: input Gram or None, should be (n, n).
        outputs: output Gram or None, should be (m, m); not beside an input Gram.

    Raises:
        ValueError: both Grams are given, a shape or the rank does not fit, or a value is not
            finite.
    """
    if weight.dim() != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} does not fit a weight of shape {tuple(weight.shape)}")
    if inputs is not None and outputs is not None:
        raise ValueError("give input_gram or output_gram, not both")
    m, n = weight.shape
    for name, item, size in (("input_gram", inputs, n), ("output_gram", outputs, m)):
        if item is not None and item.shape != (size, size):
            raise ValueError(f"{name} must be {size} x {size}, got {tuple(item.shape)}")
    for name, item in (("weight", weight), ("input_gram", inputs), ("output_gram", outputs)):
        if item is not None and not item.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
