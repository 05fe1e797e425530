"""The LoRA correction: exact where the equations promise it, and never harmful."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.tensors.linalg.correct import (
    ActivationMoments,
    CorrectionEffect,
    LoraPair,
    correct_covariance,
    correct_identity,
)
from emloc.tensors.linalg.gram import cross, gram

F64 = torch.float64
M, N, R = 7, 11, 4
seeds = st.integers(0, 9999)
scales = st.sampled_from([0.5, 1.0, 2.0, 4.0])
clamps = st.one_of(st.none(), st.floats(0, 5))
quick = settings(max_examples=40)


def normal(seed: int, *shape: int) -> Tensor:
    """Return float64 Gaussian numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(seed: int, scale: float = 1.0) -> tuple[LoraPair, Tensor, Tensor]:
    """Return a LoRA pair, a residual (M, N) and 60 tokens with one massive direction."""
    pair = LoraPair(normal(seed, R, N), 0.3 * normal(seed + 1, M, R), scale)
    x = normal(seed + 2, 60, N)
    x[:, 0] *= 30
    return pair, normal(seed + 3, M, N), x @ torch.linalg.qr(normal(seed + 4, N, N)).Q


def moments(pair: LoraPair, x: Tensor) -> ActivationMoments:
    """Return the moments that a pass over the samples records; no n x n matrix is formed."""
    features = x @ pair.a.double().T
    return ActivationMoments(gram(features), cross(x.double(), features), len(x))


def energy(pair: LoraPair, new: LoraPair, residual: Tensor, x: Tensor) -> float:
    """Mean squared output difference: original with `new` against emulator with `pair`."""
    return float((x @ (residual + new.delta - pair.delta).T).square().sum()) / len(x)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    """Assert that two tensors are equal up to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@given(seed=seeds, scale=scales)
@quick
def test_plug_back(seed: int, scale: float) -> None:
    """W x + s B' A' x = W_e x + s B A x holds for x in the rows of A, at each scale."""
    pair, residual, _ = problem(seed, scale)
    emulator = normal(seed + 5, M, N)
    new, change = correct_identity(pair, residual, clamp=None)
    x = pair.a.T @ normal(seed + 6, R, 3)
    close((emulator + residual + new.delta) @ x, (emulator + pair.delta) @ x)
    close(new.a @ new.a.T, torch.eye(R, dtype=F64))
    assert new.scale == scale
    assert (change.directions, change.clamped) == (R, 0.0)


@given(seed=seeds, scale=scales)
@quick
def test_covariance_is_stationary(seed: int, scale: float) -> None:
    """The remaining error is uncorrelated with the LoRA features, as in least squares."""
    pair, residual, x = problem(seed, scale)
    new, _ = correct_covariance(pair, residual, moments(pair, x), clamp=None)
    remaining_error = x @ (residual + new.delta - pair.delta).T
    close(remaining_error.T @ (x @ pair.a.T) / len(x), torch.zeros(M, R, dtype=F64), 1e-7)
    fit = torch.linalg.lstsq(scale * x @ pair.a.T, -x @ residual.T).solution.T
    close(new.b, pair.b + fit, 1e-8)
    assert torch.equal(new.a, pair.a)


@given(seed=seeds, scale=scales, clamp=clamps, strength=st.floats(0, 1))
@quick
def test_covariance_never_hurts(
    seed: int, scale: float, clamp: float | None, strength: float
) -> None:
    """With any clamp the energy on the tokens does not grow; `removed` is the difference."""
    pair, residual, x = problem(seed, scale)
    new, change = correct_covariance(
        pair, residual, moments(pair, x), clamp=clamp, strength=strength
    )
    before, after = energy(pair, pair, residual, x), energy(pair, new, residual, x)
    assert after <= before * (1 + 1e-12)
    assert change.removed == pytest.approx(before - after, abs=1e-9 * before)


@given(seed=seeds, scale=scales, clamp=clamps, strength=st.floats(0, 1))
@quick
def test_identity_removes_what_it_says(
    seed: int, scale: float, clamp: float | None, strength: float
) -> None:
    """On white inputs the removed energy is measured by the Frobenius norm."""
    pair, residual, _ = problem(seed, scale)
    new, change = correct_identity(pair, residual, clamp=clamp, strength=strength)
    after = (residual + new.delta - pair.delta).square().sum()
    assert change.removed == pytest.approx(float(residual.square().sum() - after), abs=1e-9)


@given(seed=seeds, scale=scales)
@quick
def test_metrics_agree_on_white_data(seed: int, scale: float) -> None:
    """With white data (C = I) both metrics give the same product."""
    pair, residual, _ = problem(seed, scale)
    white = ActivationMoments(pair.a @ pair.a.T, pair.a.T, 1)
    one, change = correct_identity(pair, residual, clamp=None)
    two, other = correct_covariance(pair, residual, white, clamp=None)
    close(one.delta, two.delta)
    assert change.removed == pytest.approx(other.removed)


@given(seed=seeds, clamp=clamps)
@quick
def test_orthogonal_silence(seed: int, clamp: float | None) -> None:
    """The correction does not change outputs of inputs orthogonal to the rows of A."""
    pair, residual, x = problem(seed)
    outside = torch.linalg.qr(pair.a.T, mode="complete").Q[:, R:]
    one, _ = correct_identity(pair, residual, clamp=clamp)
    two, _ = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
    for new in (one, two):
        close(new.delta @ outside, torch.zeros(M, N - R, dtype=F64))


@given(seed=seeds, clamp=clamps)
@quick
def test_no_residual_no_change(seed: int, clamp: float | None) -> None:
    """A layer without a residual keeps its LoRA unchanged."""
    pair, residual, x = problem(seed)
    one, change = correct_identity(pair, 0 * residual, clamp=clamp)
    two, other = correct_covariance(pair, 0 * residual, moments(pair, x), clamp=clamp)
    close(one.delta, pair.delta)
    assert torch.equal(two.b, pair.b)
    assert change == other == CorrectionEffect(R, ratio=0.0, clamped=0.0, removed=0.0)


@pytest.mark.parametrize("option", [{"clamp": 0.0}, {"clamp": 0.0, "strength": 0.5}])
@pytest.mark.parametrize("metric", ["identity", "covariance"])
def test_clamp_zero_is_uncorrected(metric: str, option: dict[str, float]) -> None:
    """With clamp 0 the LoRA stays as it is, and the reported change is zero."""
    pair, residual, x = problem(3, 2.0)
    if metric == "identity":
        new, change = correct_identity(pair, residual, **option)
    else:
        new, change = correct_covariance(pair, residual, moments(pair, x), **option)
    close(new.delta, pair.delta, 1e-13)
    assert (change.clamped, change.removed) == (1.0, 0.0)
    assert change.ratio is not None
    assert change.ratio > 0.1


def test_strength_is_a_straight_line() -> None:
    """Strength interpolates linearly: 0 is uncorrected, 1 the full correction, clamped or not."""
    pair, residual, x = problem(4, 0.5)
    recorded_moments = moments(pair, x)
    for clamp in (None, 1.0):
        for results in (
            [correct_identity(pair, residual, clamp=clamp, strength=t)[0] for t in (0, 0.5, 1)],
            [
                correct_covariance(pair, residual, recorded_moments, clamp=clamp, strength=t)[0]
                for t in (0, 0.5, 1)
            ],
        ):
            none, half, full = (new.delta for new in results)
            close(none, pair.delta)
            close(half, (none + full) / 2)
            assert (full - none).norm() > 0.1


@given(seed=seeds, clamp=clamps)
@quick
def test_gauge(seed: int, clamp: float | None) -> None:
    """(G A, B G^-1) is an equivalent LoRA; only the identity metric's clamp may change results."""
    pair, residual, x = problem(seed, 2.0)
    turn = torch.linalg.qr(normal(seed + 7, R, R)).Q * torch.tensor([0.5, 1, 2, 3], dtype=F64)
    turn = turn @ torch.linalg.qr(normal(seed + 8, R, R)).Q
    other = LoraPair(turn @ pair.a, pair.b @ torch.linalg.inv(turn), pair.scale)
    close(other.delta, pair.delta)
    one, _ = correct_identity(pair, residual, clamp=None)
    two, _ = correct_identity(other, residual, clamp=None)
    close(one.delta, two.delta, 1e-8)
    one, _ = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
    two, _ = correct_covariance(other, residual, moments(other, x), clamp=clamp)
    close(one.delta, two.delta, 1e-7)


@given(seed=seeds, scale=scales, clamp=st.floats(0, 5))
@quick
def test_identity_clamp_bounds_each_direction(seed: int, scale: float, clamp: float) -> None:
    """The mean |correction| is at most clamp times mean |B|; clamped directions reach the bound."""
    pair, residual, _ = problem(seed, scale)
    same, free = correct_identity(pair, 0 * residual, clamp=None)
    assert free.removed == 0
    whole, _ = correct_identity(pair, residual, clamp=None)
    new, change = correct_identity(pair, residual, clamp=clamp)
    limit = clamp * same.b.abs().mean(0)
    unclamped_size, clamped_size = (whole.b - same.b).abs().mean(0), (new.b - same.b).abs().mean(0)
    close(clamped_size, torch.minimum(unclamped_size, limit), 1e-12)
    assert change.clamped == pytest.approx(float((unclamped_size > limit).double().mean()))


@given(seed=seeds, scale=scales, clamp=st.floats(0, 5))
@quick
def test_covariance_clamp_bounds_each_direction(seed: int, scale: float, clamp: float) -> None:
    """Per principal component, the correction's RMS output is at most clamp times the LoRA's."""
    pair, residual, x = problem(seed, scale)
    new, change = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
    # Computed independently of the implementation: principal components of the LoRA outputs.
    features = x @ pair.a.T
    _, singular, inputs = torch.linalg.svd(features @ pair.b.T, full_matrices=False)
    size = singular[:R] / math.sqrt(len(x))
    upper = torch.linalg.qr(features).R / math.sqrt(len(x))
    turned = torch.linalg.svd(upper @ pair.b.T, full_matrices=False).U
    step = ((new.b - pair.b) @ upper.T @ turned).norm(dim=0)
    assert inputs.shape == (M, M)
    assert (step <= clamp * size * (1 + 1e-6) + 1e-9).all()
    reached = (step >= clamp * size * (1 - 1e-6) - 1e-9).double().mean()
    assert change.clamped <= float(reached) + 1e-12


def test_untrained_lora() -> None:
    """An untrained LoRA (B = 0) stays 0 if clamped; unclamped, the reported ratio is NaN."""
    pair, residual, x = problem(8)
    pair = LoraPair(pair.a, 0 * pair.b, 2.0)
    for clamp in (3.0, None):
        one, change = correct_identity(pair, residual, clamp=clamp)
        two, other = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
        assert change.ratio is None
        assert other.ratio is None
        assert (one.delta.norm() > 1, two.delta.norm() > 1) == ((clamp is None,) * 2)
        json.dumps([asdict(change), asdict(other)], allow_nan=False)


@pytest.mark.parametrize("clamp", [None, 3.0])
def test_dependent_rows(clamp: float | None) -> None:
    """An A with dependent rows gives an exact correction on its row space and none elsewhere."""
    pair, residual, x = problem(9, 2.0)
    a = pair.a.clone()
    a[2], a[3] = a[0] - a[1], 0
    pair = LoraPair(a, pair.b, 2.0)
    outside = torch.linalg.svd(a).Vh[2:].T
    one, change = correct_identity(pair, residual, clamp=clamp)
    two, other = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
    assert change.directions == other.directions == 2
    for new in (one, two):
        close(new.delta @ outside, torch.zeros(M, N - 2, dtype=F64))
    if clamp is None:
        close((residual + one.delta) @ a.T, pair.delta @ a.T)
    assert energy(pair, two, residual, x) <= energy(pair, pair, residual, x)


def test_zero_a() -> None:
    """A LoRA with A = 0 cannot correct anything."""
    pair, residual, x = problem(10)
    pair = LoraPair(0 * pair.a, pair.b, 1.0)
    one, change = correct_identity(pair, residual, clamp=None)
    two, other = correct_covariance(pair, residual, moments(pair, x), clamp=None)
    assert one.delta.norm() == two.delta.norm() == 0
    assert change == other == CorrectionEffect(0, ratio=None, clamped=0.0, removed=0.0)


def test_fewer_tokens_than_rank() -> None:
    """Directions of A without data keep the trained LoRA; directions with data are exact."""
    pair, residual, x = problem(11, 2.0)
    x = x[:2]
    new, change = correct_covariance(pair, residual, moments(pair, x), clamp=None)
    assert change.directions == 2
    assert energy(pair, new, residual, x) < 1e-12 * energy(pair, pair, residual, x)
    blind = torch.linalg.svd(x @ pair.a.T).Vh[2:].T
    close(new.b @ blind, pair.b @ blind)


@pytest.mark.parametrize("shape", [(2, 11), (7, 3)])
def test_rank_above_a_side(shape: tuple[int, int]) -> None:
    """A rank above the number of outputs or inputs keeps the shapes and the guarantees."""
    m, n = shape
    pair, residual, x = (
        LoraPair(normal(0, R, n), normal(1, m, R), 2.0),
        normal(2, m, n),
        normal(3, 9, n),
    )
    one, _ = correct_identity(pair, residual, clamp=None)
    assert (one.a.shape, one.b.shape) == ((R, n), (m, R))
    close((residual + one.delta) @ pair.a.T, pair.delta @ pair.a.T)
    for clamp in (None, 0.5):
        two, change = correct_covariance(pair, residual, moments(pair, x), clamp=clamp)
        gain = energy(pair, pair, residual, x) - energy(pair, two, residual, x)
        assert change.removed == pytest.approx(gain)
        assert gain > 0


def test_median_ratio() -> None:
    """The reported ratio is the size of the unclamped correction relative to B, with the scale."""
    a, b = torch.eye(3, 5, dtype=F64), torch.ones(2, 3, dtype=F64)
    a = a * torch.tensor([[3.0], [2.0], [1.0]], dtype=F64)
    residual = torch.zeros(2, 5, dtype=F64)
    residual[:, 0], residual[:, 1], residual[:, 2] = 12, 40, 2
    _, change = correct_identity(LoraPair(a, b, 2.0), residual, clamp=3.0)
    # The columns of D A'^T / s have norms 6, 20, 1, and those of B' have norms 3, 2, 1.
    assert change.ratio == pytest.approx(2)
    assert change.clamped == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_pairs(dtype: torch.dtype) -> None:
    """16-bit inputs are exact numbers; only the result is rounded, to float32."""
    pair, residual, x = problem(12, 2.0)
    pair = LoraPair(pair.a.to(dtype).requires_grad_(), pair.b.to(dtype).requires_grad_(), 2.0)
    wide = LoraPair(pair.a.detach().double(), pair.b.detach().double(), 2.0)
    recorded_moments = moments(wide, x)
    for new, expected in (
        (correct_identity(pair, residual, clamp=3.0), correct_identity(wide, residual, clamp=3.0)),
        (
            correct_covariance(pair, residual, recorded_moments, clamp=3.0),
            correct_covariance(wide, residual, recorded_moments, clamp=3.0),
        ),
    ):
        assert new[0].a.dtype == new[0].b.dtype == torch.float32
        assert not new[0].delta.requires_grad
        close(new[0].delta.double(), expected[0].delta, 1e-5)
        assert new[1] == expected[1]


def test_bad_input_is_refused() -> None:
    """The errors name the wrong shape or range."""
    pair, residual, x = problem(13)
    recorded_moments = moments(pair, x)
    with pytest.raises(ValueError, match=r"a \(4, 11\), b \(4, 7\)"):
        LoraPair(pair.a, pair.b.T, 1.0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale"):
            LoraPair(pair.a, pair.b, scale)
    with pytest.raises(ValueError, match="at least one token"):
        ActivationMoments(recorded_moments.aca, recorded_moments.ca, 0)
    with pytest.raises(ValueError, match=r"residual must be \(7, 11\)"):
        correct_identity(pair, residual.T, clamp=3.0)
    for clamp in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clamp"):
            correct_identity(pair, residual, clamp=clamp)
    with pytest.raises(ValueError, match="strength"):
        correct_covariance(pair, residual, recorded_moments, clamp=None, strength=1.5)
    with pytest.raises(ValueError, match="moments must be"):
        correct_covariance(
            pair,
            residual,
            ActivationMoments(recorded_moments.ca, recorded_moments.aca, 5),
            clamp=None,
        )
