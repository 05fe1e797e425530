"""Low-rank factors of a linear layer's weight that keep most of the layer's output energy.

Shapes: weight W (m, n) as torch stores it (out, in), rank k, factors u (m, k) and v (k, n) with
W ~ u v, input Gram C = X^T X (n, n), output Gram K = W C W^T (m, m) of outputs without bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.tensors.linalg.gram import NEGLIGIBLE, exact_float32, has_data

# Rows of a large weight that are in float64 at a time.
SPAN = 4096
# Relative to the mean diagonal: far below directions worth refitting, far above float64 rounding.
RIDGE = 1e-8

# The reference implementation's floor for eigenvalues of the trace-normalised Gram.
WHITEN_FLOOR = 1e-7


@dataclass(frozen=True)
class Factors:
    """The factors u (m, k) and v (k, n) of one weight, with the spectrum of output energies."""

    u: Tensor
    v: Tensor
    kept_share: float  # share of the output energy ||W C^1/2||^2 in the k directions, in [0, 1]
    # Output energy of every direction, (min(m, n),) float64, descending. The subspace solver has
    # only the k kept directions, (k,): their sum is exact, each is within some per cent of its
    # eigenvalue.
    spectrum: Tensor
    data_rank: int  # number of leading columns of u chosen by data; the others approximate W alone
    solver: str  # eigen, subspace or whiten: the solver that succeeded, not the requested one
    steps: int = 0  # subspace steps (products with K); wasted if the solver is eigen


def rank_of(ratio: float, rows: int, columns: int, multiple: int = 1) -> int:
    """Largest rank whose two factors have at most `ratio` of the weight's parameters.

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
    # Python's floor division of floats is exact, so the rank never exceeds the budget.
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
    """Best rank-k factors of a weight on its calibration tokens (EMLoC, stage 1).

    By Eckart-Young no rank-k matrix is closer to W in ||(W - W_k) C^1/2|| than U U^T W, with U the
    leading eigenvectors of W C W^T: the layer followed by a projection on the principal components
    of its outputs. If C is invertible, this equals the whitened SVD (see `whiten`), but it needs
    neither a root nor an inverse of C. It costs one float64 eigendecomposition of size min(m, n).

    If fewer than k directions have data, the others are those that lose the least of W itself. v is
    rounded to `dtype` first; if C is known, u is then refitted to a rounded v. With `output_gram`
    alone u is only rounded; a second pass over the tokens with `refit` improves it.

    Args:
        weight: (m, n).
        rank: k, from 1 to min(m, n).
        input_gram: (n, n) sum of x x^T over tokens; without any Gram C = I, a plain truncated SVD.
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
    basis, core, energy = energy_matrix(w, gram, output_gram)
    values, vectors = torch.linalg.eigh(energy)
    values, vectors = values.flip(0), vectors.flip(1)
    data_rank = int(has_data(values)[:rank].sum())
    left = _fill_directions(core, vectors, rank, data_rank)
    u = left if basis is None else basis @ left
    v = (u.T @ w).to(dtype)
    if output_gram is None and v.dtype != w.dtype:
        u = refit_to_v(w, u, v, gram)
    spectrum = values.clamp(min=0)
    return Factors(u.to(dtype), v, _kept_share(spectrum, rank), spectrum, data_rank, "eigen")


def energy_matrix(
    w: Tensor, gram: Tensor | None, output_gram: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Energy matrix of a weight, whose eigenvalues are the output energies of the directions.

    Args:
        w: (m, n) float64.
        gram: (n, n) float64 input Gram C, or None.
        output_gram: (m, m), or None; without any Gram C = I.

    Returns:
        Q, R and R C R^T (p, p) with W = Q R and p = min(m, n); Q is None if m <= n, where R = W.
    """
    # The outputs of a tall W lie in its column space, so the problem shrinks to n x n.
    basis, core = torch.linalg.qr(w) if w.shape[0] > w.shape[1] else (None, w)
    if output_gram is not None:
        outputs = output_gram.double()
        energy = outputs if basis is None else basis.T @ outputs @ basis
    else:
        energy = core @ core.T if gram is None else core @ gram @ core.T
    return basis, core, (energy + energy.T) / 2


def refit_to_v(w: Tensor, u0: Tensor, v: Tensor, input_gram: Tensor | None) -> Tensor:
    """Refit u to a rounded v by least squares on the layer's inputs (see `refit`).

    Rows do not depend on each other, so only a span of them is in float64 at a time.

    Args:
        w: (m, n).
        u0: (m, k) float64, optimal for v before it was rounded.
        v: (k, n) rounded.
        input_gram: (n, n) float64; None for C = I.

    Returns:
        (m, k) float64.
    """
    exact = v.double()
    z = exact if input_gram is None else exact @ input_gram.double()
    zz, u = z @ exact.T, torch.empty_like(u0, dtype=torch.float64)
    spans = (torch.split(matrix.detach(), SPAN) for matrix in (w, u0, u))
    for rows, start, result in zip(*spans, strict=True):
        result.copy_(refit(rows.double() @ z.T, zz, start))
    return u


def times(w: Tensor, matrix: Tensor) -> Tensor:
    """Return the product of w (m, n) of any dtype and a matrix (n, k) in float64, as (m, k)."""
    product = matrix.new_empty(len(w), matrix.shape[1])
    spans = (torch.split(matrix.detach(), SPAN) for matrix in (w, product))
    for rows, result in zip(*spans, strict=True):
        torch.mm(rows.double(), matrix, out=result)
    return product


def gram_of_columns(w: Tensor) -> Tensor:
    """Return W^T W (n, n) in float64, of W (m, n) of any dtype."""
    first, *others = torch.split(w.detach(), SPAN)
    gram = first.double().T @ first.double()
    for rows in others:
        exact = rows.double()
        gram.addmm_(exact.T, exact)
    return gram


def refit(yz: Tensor, zz: Tensor, u0: Tensor) -> Tensor:
    """Least-squares u that maps the hidden features z = v x to the layer's outputs y.

    The unknown is the step from u0, with a tiny ridge. So the squared error never exceeds that of
    u0, and u0 is unchanged in directions of z without data.

    Args:
        yz: (m, k) sum of y z^T over tokens, y the outputs of the original layer without bias.
        zz: (k, k) sum of z z^T over the same tokens.
        u0: (m, k) start value, of any dtype.

    Returns:
        (m, k) float64.

    Raises:
        ValueError: the shapes do not fit.
    """
    if yz.shape != u0.shape or zz.shape != (u0.shape[1], u0.shape[1]):
        shapes = [tuple(item.shape) for item in (yz, zz, u0)]
        raise ValueError(f"need yz (m, k), zz (k, k), u0 (m, k), got {shapes}")
    start, gram = u0.detach().double(), zz.double()
    error = yz.double() - start @ gram
    step = _ridge_step(error, (gram + gram.T) / 2)
    if step is not None:
        return start + step
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    with_data = has_data(values)
    if not with_data.any():
        return start
    inverse = with_data / (values.clamp(min=0) + RIDGE * values.clamp(min=0).mean())
    return start + (error @ vectors * inverse) @ vectors.T


def whiten(weight: Tensor, rank: int, input_gram: Tensor, *, dtype: torch.dtype) -> Factors:
    """Factors by whitened SVD, as the authors' implementation computes them (EMLoC, stage 1).

    It serves as a reference. All steps are in float32: S with S S^T = C from an eigendecomposition
    with clamped eigenvalues, an SVD of W S, and an inverse of S. u and v each get the square root
    of the singular values.

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
    kept_share = _kept_share(spectrum, rank)
    return Factors(u.to(dtype), v.to(dtype), kept_share, spectrum, rank, "whiten")


def lost_energy(weight: Tensor, factors: Factors, input_gram: Tensor | None = None) -> float:
    """Share of the output energy that the factors lose: ||(W - u v) C^1/2||^2 / ||W C^1/2||^2.

    Args:
        weight: (m, n).
        factors: of this weight.
        input_gram: (n, n); None for C = I.

    Returns:
        At least 0 up to rounding; 0 if the layer has no output energy.
    """
    w = weight.detach().double()
    residual = w - factors.u.double() @ factors.v.double()
    total, left = _energy(w, input_gram), _energy(residual, input_gram)
    return left / total if total > 0 else 0.0


def _ridge_step(error: Tensor, gram: Tensor) -> Tensor | None:
    """`error` (gram + ridge)^-1 by Cholesky; None if a direction of `gram` may lack data."""
    # If the Gram stays positive definite after subtracting the threshold of `has_data` (the norm
    # bounds the largest eigenvalue), all directions have data and no eigendecomposition is needed.
    lowered, ridged = gram.clone(), gram.clone()
    lowered.diagonal().sub_(NEGLIGIBLE * gram.norm())
    lower, failed = torch.linalg.cholesky_ex(lowered)
    # NaN compares as not greater than zero, so it ends in `eigh`, which raises an error.
    if not bool((failed == 0) & (lower[-1, -1] > 0)):
        return None
    ridged.diagonal().add_(RIDGE * gram.diagonal().mean())
    lower = torch.linalg.cholesky_ex(ridged).L
    return torch.cholesky_solve(error.T, lower).T


def _energy(w: Tensor, gram: Tensor | None) -> float:
    """Output energy ||W C^1/2||^2 of a matrix; C = I if `gram` is None."""
    return float(((w if gram is None else w @ gram.double()) * w).sum())


def _kept_share(spectrum: Tensor, rank: int) -> float:
    """Share of the total energy in the `rank` strongest directions; 1 if there is no energy."""
    total = float(spectrum.sum())
    return float(spectrum[:rank].sum()) / total if total > 0 else 1.0


def _fill_directions(core: Tensor, vectors: Tensor, rank: int, data_rank: int) -> Tensor:
    """The `data_rank` leading vectors, filled up to `rank` with directions that keep most of W.

    Args:
        core: R of `energy_matrix`.
        vectors: (p, p) eigenvectors of the energy matrix, strongest first.
        rank: number of directions to return.
        data_rank: number of leading vectors that have data.
    """
    if data_rank == rank:
        return vectors[:, :rank]
    # Within the complement of the leading vectors, so the filling is orthogonal to them even where
    # W vanishes.
    spare = vectors[:, data_rank:]
    rest = spare.T @ core
    best = torch.linalg.eigh(rest @ rest.T).eigenvectors.flip(1)[:, : rank - data_rank]
    return torch.cat([vectors[:, :data_rank], spare @ best], dim=1)


def check(weight: Tensor, rank: int, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Raise ValueError for arguments that no solver can factorise.

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
        raise ValueError("pass input_gram or output_gram, not both")
    m, n = weight.shape
    for name, item, size in (("input_gram", inputs, n), ("output_gram", outputs, m)):
        if item is not None and item.shape != (size, size):
            raise ValueError(f"{name} must be {size} x {size}, got {tuple(item.shape)}")
    for name, item in (("weight", weight), ("input_gram", inputs), ("output_gram", outputs)):
        if item is not None and not item.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
