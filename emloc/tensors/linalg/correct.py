"""Carry a LoRA trained on an emulator to the original layer (EMLoC, stage 3).

Shapes: LoRA a (r, n), b (m, r), delta W = s b a with s = alpha / r; residual D = W - W_e (m, n)
between original and emulator weight; C (n, n) the sum of x x^T over N tokens, x the layer's inputs.

Everything is weights against weights: run through biased bf16 layers instead, the bias would only
cancel up to its rounding, which can be as large as the correction itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from emloc.tensors.linalg.gram import supported


@dataclass(frozen=True)
class LoraPair:
    """One LoRA module with its scale alpha / r, which travels with it so that none forgets it."""

    a: Tensor  # (r, n)
    b: Tensor  # (m, r)
    scale: float

    def __post_init__(self) -> None:
        """Refuse shapes that do not multiply and a scale no correction can be divided by."""
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            shapes = f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}"
            raise ValueError(f"need a (r, n) and b (m, r), got {shapes}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale (alpha / r) must be positive and finite, got {self.scale}")

    @property
    def delta(self) -> Tensor:
        """What the LoRA adds to the weight, (m, n)."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class ActivationMoments:
    """What the covariance metric needs of the activations: float64 sums, no n x n matrix.

    With X the inputs and G = X A^T, A as in the pair to correct: `aca` is G^T G, `ca` is X^T G.
    """

    aca: Tensor  # (r, r)
    ca: Tensor  # (n, r)
    tokens: int

    def __post_init__(self) -> None:
        """Refuse a mean over nothing."""
        if self.tokens < 1:
            raise ValueError(f"moments need at least one token, got {self.tokens}")


@dataclass(frozen=True)
class CorrectionEffect:
    """What a correction did to one module. Directions are those the clamp works in."""

    directions: int  # of r; the others are not in the row space of A or never saw data: untouched
    ratio: float | None  # median size of correction / LoRA, unclamped; None: none, or infinite
    clamped: float  # share of the directions the clamp shortened
    # Mismatch energy ||(W + s B' A) x - (W_e + s B A) x||^2 taken away from that of the uncorrected
    # B: the mean over calibration tokens (covariance) or over white unit-variance x (identity).
    removed: float


def correct_identity(
    pair: LoraPair, residual: Tensor, *, clamp: float | None, strength: float = 1.0
) -> tuple[LoraPair, CorrectionEffect]:
    """The paper's correction: every input direction counts the same (EMLoC, stage 3).

    A is replaced by an orthonormal basis of its rows, which leaves B A as it is; then D A^T / s is
    subtracted from B. Unclamped, (W + s B' A) x = (W_e + s B A) x for every x in the rows of A.
    The clamp limits, per direction, the mean |correction| to `clamp` times the mean |B|: where the
    LoRA learnt little it had little to compensate. It depends on the basis, which is the SVD's.

    Args:
        pair: as trained on the emulator.
        residual: (m, n) D, the weights both networks really multiply by.
        clamp: the paper's lambda (3); None for no clamp, 0 for no correction.
        strength: in [0, 1], multiplies the clamped correction.

    Returns:
        The corrected pair, same shapes and scale, float32 (float64 where the pair is), and what
        was done. a is re-based: rows orthonormal.

    Raises:
        ValueError: a shape does not fit or clamp or strength is out of range.
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    _check(pair, residual, clamp, strength)
    a, b = pair.a.detach().double(), pair.b.detach().double()
    left, singular, basis = torch.linalg.svd(a, full_matrices=False)
    # A vanishing singular value comes with an arbitrary direction outside the rows of A.
    live = supported(singular)
    outputs = b @ left * singular
    step = residual.detach().double() @ basis.T / pair.scale * live
    tau = _damping(step.abs().mean(0), outputs.abs().mean(0), clamp)
    spare = pair.a.shape[0] - basis.shape[0]
    new_a, new_b = pad(basis, (0, 0, 0, spare)), pad(outputs - strength * step * tau, (0, spare))
    sizes = step.abs().mean(0)[live], outputs.abs().mean(0)[live]
    energy = (pair.scale * step).square().sum(0)[live]
    return _like(pair, new_a, new_b), _change(sizes, tau[live], energy, strength)


def correct_covariance(
    pair: LoraPair,
    residual: Tensor,
    moments: ActivationMoments,
    *,
    clamp: float | None,
    strength: float = 1.0,
) -> tuple[LoraPair, CorrectionEffect]:
    """The correction that counts every input direction as the calibration tokens do.

    B' = B - D C A^T (A C A^T)^-1 / s minimises the mean of ||(W + s B' A) x - (W_e + s B A) x||^2
    over the tokens. (With C = I: the paper's correction.) It cannot increase that mean, clamped or
    not: the directions are those of unit mean square on the tokens, rotated to the principal
    components of the LoRA's output, and the energy is separable over them. The clamp limits, per
    direction, the root mean square of the correction's output to `clamp` times the LoRA's.

    Args:
        pair: as trained on the emulator.
        residual: (m, n) D, the weights both networks really multiply by.
        moments: of the original model's activations, taken with this pair's a.
        clamp: as in `correct_identity`, on root mean squares; None for no clamp.
        strength: in [0, 1], multiplies the clamped correction.

    Returns:
        The corrected pair, same shapes and scale, float32 (float64 where the pair is), and what
        was done. a is unchanged.

    Raises:
        ValueError: a shape does not fit or clamp or strength is out of range.
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
    live = supported(values)
    root, vectors = values[live].sqrt(), vectors[:, live]
    # In these coordinates the features have unit second moment; any rotation keeps that.
    rotation = _rotation(b @ vectors * root)
    into, back = (vectors * root) @ rotation, (vectors / root) @ rotation
    outputs = b @ into
    step = residual.detach().double() @ (moments.ca.double() @ back) / moments.tokens / pair.scale
    sizes = step.norm(dim=0), outputs.norm(dim=0)
    tau = _damping(*sizes, clamp)
    new_b = b - strength * (step * tau) @ back.T
    energy = (pair.scale * step).square().sum(0)
    return _like(pair, pair.a.detach(), new_b), _change(sizes, tau, energy, strength)


def _rotation(outputs: Tensor) -> Tensor:
    """(p, p) orthogonal, turning the columns of outputs (m, p) into principal components."""
    upper = torch.linalg.qr(outputs, mode="r").R
    return torch.linalg.svd(upper, full_matrices=True).Vh.T


def _damping(step: Tensor, outputs: Tensor, clamp: float | None) -> Tensor:
    """Factors in [0, 1] that bring the sizes `step` down to `clamp` times the sizes `outputs`."""
    if clamp is None:
        return torch.ones_like(step)
    limit = clamp * outputs
    return torch.where(step > limit, limit / step, 1.0)


def _change(
    sizes: tuple[Tensor, Tensor], tau: Tensor, energy: Tensor, strength: float
) -> CorrectionEffect:
    step, outputs = sizes
    count = tau.numel()
    # A step along a direction the LoRA never used is infinitely large; no step is no change.
    ratios = torch.where(step > 0, step / outputs, 0.0)
    middle = float(ratios.median()) if count else math.inf
    share = strength * tau
    return CorrectionEffect(
        directions=count,
        ratio=middle if math.isfinite(middle) else None,
        clamped=float((tau < 1).sum()) / max(count, 1),
        removed=float((energy * share * (2 - share)).sum()),
    )


def _like(pair: LoraPair, a: Tensor, b: Tensor) -> LoraPair:
    wide = pair.a.dtype == pair.b.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return LoraPair(a.to(dtype), b.to(dtype), pair.scale)


def _check(pair: LoraPair, residual: Tensor, clamp: float | None, strength: float) -> None:
    expected = (pair.b.shape[0], pair.a.shape[1])
    if residual.shape != expected:
        raise ValueError(f"residual must be {expected}, got {tuple(residual.shape)}")
    if clamp is not None and not 0 <= clamp < math.inf:
        raise ValueError(f"clamp must be at least 0 and finite, or None, got {clamp}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
