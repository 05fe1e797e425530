"""Correct a LoRA that was trained on an emulator, for use on the original layer (EMLoC, stage 3).

Shapes: LoRA a (r, n), b (m, r), delta W = s b a with s = alpha / r; residual D = W - W_e (m, n)
between original and emulator weight; C (n, n) the sum of x x^T over N tokens, x the layer's inputs.

The correction compares weights, not outputs of the layers. With outputs of bf16 layers, the bias
would only cancel up to rounding, and that error can be as large as the correction itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from emloc.tensors.linalg.gram import has_data


@dataclass(frozen=True)
class LoraPair:
    """The matrices of one layer's LoRA with their scale alpha / r, so that no code forgets it."""

    a: Tensor  # (r, n)
    b: Tensor  # (m, r)
    scale: float

    def __post_init__(self) -> None:
        """Raise ValueError if the shapes do not match, or the scale is not positive and finite."""
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            shapes = f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}"
            raise ValueError(f"need a (r, n) and b (m, r), got {shapes}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale (alpha / r) must be positive and finite, got {self.scale}")

    @property
    def delta(self) -> Tensor:
        """The update of the weight, s b a (m, n)."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class ActivationMoments:
    """Activation moments for the covariance metric: float64 sums, without an n x n matrix.

    With the layer's inputs X (N, n), A of the LoRA to correct and G = X A^T (N, r): `aca` is G^T G,
    `ca` is X^T G.
    """

    aca: Tensor  # (r, r)
    ca: Tensor  # (n, r)
    tokens: int

    def __post_init__(self) -> None:
        """Raise ValueError if there are no tokens to average over."""
        if self.tokens < 1:
            raise ValueError(f"moments need at least one token, got {self.tokens}")


@dataclass(frozen=True)
class CorrectionEffect:
    """The effect of a correction on one layer, in the directions that the clamp works in."""

    # Number of corrected directions, at most r; others lie outside the rows of A or have no data.
    directions: int
    ratio: float | None  # median of |correction| / |LoRA| before the clamp; None: none, or infinite
    clamped: float  # share of the directions that the clamp shortened
    # Reduction of the mismatch ||(W + s B' A) x - (W_e + s B A) x||^2, relative to B' = B: its mean
    # over calibration tokens (covariance), or over white unit-variance x (identity).
    removed: float


def correct_identity(
    pair: LoraPair, residual: Tensor, *, clamp: float | None, strength: float = 1.0
) -> tuple[LoraPair, CorrectionEffect]:
    """Correct a LoRA as in the paper: all input directions have the same weight (EMLoC, stage 3).

    A is replaced by an orthonormal basis of its rows, which leaves B A as it is; then D A^T / s is
    subtracted from B. Unclamped, (W + s B' A) x = (W_e + s B A) x for every x in the rows of A.
    The clamp limits, per direction, the mean |correction| to `clamp` times the mean |B|, since a
    LoRA that learnt little in a direction compensated little. The clamp depends on the basis, which
    is that of the SVD of A.

    Args:
        pair: as trained on the emulator.
        residual: (m, n) D, the difference of the weights that both models multiply by.
        clamp: the paper's lambda (3); None for no clamp, 0 for no correction.
        strength: in [0, 1], multiplies the clamped correction.

    Returns:
        The corrected pair with the same shapes and scale, in float32 (float64 if `pair` is), and
        the effect. The rows of its a are orthonormal.

    Raises:
        ValueError: a shape does not fit, or clamp or strength is out of range.
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    _check(pair, residual, clamp, strength)
    a, b = pair.a.detach().double(), pair.b.detach().double()
    left, singular, basis = torch.linalg.svd(a, full_matrices=False)
    # The direction of a vanishing singular value is arbitrary and lies outside the rows of A.
    with_data = has_data(singular)
    outputs = b @ left * singular
    step = residual.detach().double() @ basis.T / pair.scale * with_data
    tau = _damping(step.abs().mean(0), outputs.abs().mean(0), clamp)
    spare = pair.a.shape[0] - basis.shape[0]
    new_a, new_b = pad(basis, (0, 0, 0, spare)), pad(outputs - strength * step * tau, (0, spare))
    sizes = step.abs().mean(0)[with_data], outputs.abs().mean(0)[with_data]
    energy = (pair.scale * step).square().sum(0)[with_data]
    return _like(pair, new_a, new_b), _effect(sizes, tau[with_data], energy, strength)


def correct_covariance(
    pair: LoraPair,
    residual: Tensor,
    moments: ActivationMoments,
    *,
    clamp: float | None,
    strength: float = 1.0,
) -> tuple[LoraPair, CorrectionEffect]:
    """Correct a LoRA with input directions weighted by the calibration tokens.

    B' = B - D C A^T (A C A^T)^-1 / s minimises the mean of ||(W + s B' A) x - (W_e + s B A) x||^2
    over the tokens. (With C = I: the paper's correction.) It cannot increase this mean, clamped or
    not: the directions have unit mean square on the tokens and are rotated to the principal
    components of the LoRA's output, so the energy is a sum over directions. The clamp limits, per
    direction, the root mean square of the correction's output to `clamp` times that of the LoRA.

    Args:
        pair: as trained on the emulator.
        residual: (m, n) D, the difference of the weights that both models multiply by.
        moments: of the original model's activations, computed with the a of this pair.
        clamp: as in `correct_identity`, on root mean squares; None for no clamp.
        strength: in [0, 1], multiplies the clamped correction.

    Returns:
        The corrected pair with the same shapes and scale, in float32 (float64 if `pair` is), and
        the effect. Its a is unchanged.

    Raises:
        ValueError: a shape does not fit, or clamp or strength is out of range.
        torch.linalg.LinAlgError: a decomposition did not converge.
    """
    _check(pair, residual, clamp, strength)
    rank, columns = pair.a.shape
    if moments.aca.shape != (rank, rank) or moments.ca.shape != (columns, rank):
        shapes = f"{tuple(moments.aca.shape)}, {tuple(moments.ca.shape)}"
        raise ValueError(f"moments must be {(rank, rank)} and {(columns, rank)}, got {shapes}")
    b = pair.b.detach().double()
    second = moments.aca.double() / moments.tokens
    values, vectors = torch.linalg.eigh((second + second.T) / 2)
    with_data = has_data(values)
    root, vectors = values[with_data].sqrt(), vectors[:, with_data]
    # In these coordinates the features have unit second moments, and so in any rotation of them.
    rotation = _rotation(b @ vectors * root)
    to_features, from_features = (vectors * root) @ rotation, (vectors / root) @ rotation
    outputs = b @ to_features
    projected = moments.ca.double() @ from_features
    step = residual.detach().double() @ projected / moments.tokens / pair.scale
    sizes = step.norm(dim=0), outputs.norm(dim=0)
    tau = _damping(*sizes, clamp)
    new_b = b - strength * (step * tau) @ from_features.T
    energy = (pair.scale * step).square().sum(0)
    return _like(pair, pair.a.detach(), new_b), _effect(sizes, tau, energy, strength)


def _rotation(outputs: Tensor) -> Tensor:
    """Orthogonal matrix (p, p) that rotates the columns of `outputs` (m, p) to principal axes."""
    upper = torch.linalg.qr(outputs, mode="r").R
    return torch.linalg.svd(upper, full_matrices=True).Vh.T


def _damping(step: Tensor, outputs: Tensor, clamp: float | None) -> Tensor:
    """Factors in [0, 1] that shorten the sizes `step` to at most `clamp` times `outputs`."""
    if clamp is None:
        return torch.ones_like(step)
    limit = clamp * outputs
    return torch.where(step > limit, limit / step, 1.0)


def _effect(
    sizes: tuple[Tensor, Tensor], tau: Tensor, energy: Tensor, strength: float
) -> CorrectionEffect:
    """Summarise a correction.

    Args:
        sizes: size of the correction and of the LoRA in each direction.
        tau: clamp factor of each direction.
        energy: mismatch energy of each direction before the correction.
        strength: multiplies the clamped correction.
    """
    step, outputs = sizes
    count = tau.numel()
    # The ratio is infinite in directions that the LoRA does not use, and 0 without a correction.
    ratios = torch.where(step > 0, step / outputs, 0.0)
    median = float(ratios.median()) if count else math.inf
    share = strength * tau
    return CorrectionEffect(
        directions=count,
        ratio=median if math.isfinite(median) else None,
        clamped=float((tau < 1).sum()) / max(count, 1),
        removed=float((energy * share * (2 - share)).sum()),
    )


def _like(pair: LoraPair, a: Tensor, b: Tensor) -> LoraPair:
    """A LoRA of a and b with the scale of `pair`, in float32, or float64 if `pair` is."""
    wide = pair.a.dtype == pair.b.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return LoraPair(a.to(dtype), b.to(dtype), pair.scale)


def _check(pair: LoraPair, residual: Tensor, clamp: float | None, strength: float) -> None:
    """Raise ValueError if a shape does not fit, or clamp or strength is out of range."""
    expected = (pair.b.shape[0], pair.a.shape[1])
    if residual.shape != expected:
        raise ValueError(f"residual must be {expected}, got {tuple(residual.shape)}")
    if clamp is not None and not 0 <= clamp < math.inf:
        raise ValueError(f"clamp must be at least 0 and finite, or None, got {clamp}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
