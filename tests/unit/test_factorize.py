"""Low-rank factors: optimal on the data, close to the weight elsewhere, rounded with care."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.tensors.linalg.factorize import Factors, eigen, lost_energy, rank_of, refit, whiten
from emloc.tensors.linalg.gram import cross, gram

F64 = torch.float64
SHAPES = [(12, 20), (20, 12), (16, 16)]


def normal(seed: int, *shape: int) -> Tensor:
    """Return float64 Gaussian numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def layer(seed: int, m: int, n: int, count: int) -> tuple[Tensor, Tensor]:
    """Return a weight (m, n) and inputs (count, n), both with a decaying spectrum."""
    rotation = torch.linalg.qr(normal(seed + 1, n, n)).Q
    spread = torch.arange(1, n + 1, dtype=F64) ** -0.7
    return normal(seed, m, n), normal(seed + 2, count, n) * spread @ rotation


def massive(seed: int, count: int, n: int, strength: float) -> Tensor:
    """Return inputs with four rotated directions `strength` times stronger than the others."""
    x = normal(seed, count, n)
    x[:, :4] *= strength
    rotation: Tensor = torch.linalg.qr(normal(seed + 1, n, n)).Q
    return x @ rotation


def product(factors: Factors) -> Tensor:
    """Return the product of the factors."""
    return factors.u.double() @ factors.v.double()


@given(
    ratio=st.floats(0.01, 0.99),
    m=st.integers(1, 5000),
    n=st.integers(1, 5000),
    multiple=st.sampled_from([1, 8, 64]),
)
@settings(max_examples=200)
def test_rank_fits_budget(ratio: float, m: int, n: int, multiple: int) -> None:
    """The rank never exceeds the budget, one more multiple would, and rank 0 is never returned."""
    if multiple * (m + n) > ratio * m * n:
        with pytest.raises(ValueError, match=f"{m} x {n}"):
            rank_of(ratio, m, n, multiple)
        return
    rank = rank_of(ratio, m, n, multiple)
    assert rank > 0
    assert rank % multiple == 0
    assert rank * (m + n) <= ratio * m * n < (rank + multiple) * (m + n)


def test_rank_of_known_layers() -> None:
    """Ranks of InternVL2.5-8B at ratio 0.4: fused qkv, output projection, feed-forward."""
    shapes = [(6144, 4096), (4096, 4096), (14336, 4096), (3072, 1024), (1024, 1024)]
    assert [rank_of(0.4, *shape) for shape in shapes] == [983, 819, 1274, 307, 204]
    assert rank_of(0.4, 4096, 4096, 64) == 768


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_rank_refuses_ratio(ratio: float) -> None:
    """A ratio must lie between 0 and 1, both excluded."""
    with pytest.raises(ValueError, match="ratio"):
        rank_of(ratio, 64, 64)


@given(seed=st.integers(0, 999), m=st.integers(1, 14), n=st.integers(1, 14), share=st.floats(0, 1))
@settings(max_examples=40)
def test_eckart_young(seed: int, m: int, n: int, share: float) -> None:
    """The weighted error is the discarded tail of the spectrum, for both kinds of Gram matrix."""
    w, x = layer(seed, m, n, 3 * n)
    rank = 1 + int(share * (min(m, n) - 1))
    for grams in ({}, {"input_gram": gram(x)}, {"output_gram": gram(x @ w.T)}):
        factors = eigen(w, rank, dtype=F64, **grams)
        spectrum, c = factors.spectrum, None if not grams else gram(x)
        assert spectrum.shape == (min(m, n),)
        assert (spectrum.diff() <= 0).all()
        tail = float(spectrum[rank:].sum() / spectrum.sum())
        assert lost_energy(w, factors, c) == pytest.approx(tail, abs=1e-12)
        assert factors.kept_share == pytest.approx(1 - tail, abs=1e-12)
        assert (factors.u.shape, factors.v.shape) == ((m, rank), (rank, n))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_whitening(shape: tuple[int, int]) -> None:
    """For well-conditioned data: matrix and spectrum of the chain root, SVD, inverse in float32."""
    w, x = layer(5, *shape, 200)
    ours = eigen(w, 6, input_gram=gram(x), dtype=F64)
    theirs = whiten(w, 6, gram(x), dtype=F64)
    torch.testing.assert_close(product(ours), product(theirs), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.spectrum, theirs.spectrum, rtol=1e-4, atol=1e-4)
    assert ours.kept_share == pytest.approx(theirs.kept_share, abs=1e-6)
    balance = theirs.u.square().sum(0)
    torch.testing.assert_close(balance, theirs.spectrum[:6].sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_gram_is_enough(shape: tuple[int, int]) -> None:
    """The output Gram matrix alone gives the same projection as the input Gram matrix."""
    w, x = layer(6, *shape, 200)
    inputs = eigen(w, 5, input_gram=gram(x), dtype=F64)
    outputs = eigen(w, 5, output_gram=gram(x @ w.T), dtype=F64)
    torch.testing.assert_close(product(inputs), product(outputs), rtol=0, atol=1e-8)
    torch.testing.assert_close(inputs.spectrum, outputs.spectrum, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_gram_is_truncated_svd(shape: tuple[int, int]) -> None:
    """Without a Gram matrix (C = I) the factors are the best approximation of W itself."""
    w = normal(7, *shape)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    expected = u[:, :4] * s[:4] @ v[:4]
    torch.testing.assert_close(product(eigen(w, 4, dtype=F64)), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [3, 200])
def test_full_rank_reproduces_weight(shape: tuple[int, int], count: int) -> None:
    """A full rank reproduces the weight exactly, even with very little data."""
    w, x = layer(8, *shape, count)
    factors = eigen(w, min(shape), input_gram=gram(x), dtype=F64)
    torch.testing.assert_close(product(factors), w, rtol=0, atol=1e-9)
    assert factors.kept_share == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_rank(shape: tuple[int, int]) -> None:
    """Rank that the data does not need approximates the weight: exact on the data, closest to W."""
    w, x = layer(9, *shape, 4)
    factors = eigen(w, 8, input_gram=gram(x), dtype=F64)
    bare = eigen(w, 4, input_gram=gram(x), dtype=F64)
    assert factors.data_rank == 4
    assert bare.kept_share == pytest.approx(1, abs=1e-12)
    assert lost_energy(w, factors, gram(x)) < 1e-12
    rest = torch.linalg.svdvals(w - product(bare))
    gap = torch.linalg.svdvals(w - product(factors))
    # The bound of Eckart-Young for the part of W that the data leaves open.
    torch.testing.assert_close(gap.square().sum(), rest[4:].square().sum(), rtol=1e-9, atol=0)
    assert lost_energy(w, factors) < 0.7 * lost_energy(w, bare)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unseen_directions_survive_the_solve(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refitting u keeps the directions without data, although a rounded v mixes data into them."""
    w, x = layer(10, *shape, 4)
    factors = eigen(w, 8, input_gram=gram(x), dtype=dtype)
    exact = eigen(w, 8, input_gram=gram(x), dtype=F64)
    assert factors.u.dtype == factors.v.dtype == dtype
    assert lost_energy(w, factors) == pytest.approx(lost_energy(w, exact), rel=0.02)
    assert lost_energy(w, factors, gram(x)) < (1e-4 if dtype == torch.bfloat16 else 1e-12)
    torch.testing.assert_close(factors.u[:, 4:].double(), exact.u[:, 4:], rtol=0, atol=4e-3)


def test_float32_noise_is_not_data() -> None:
    """With few tokens and massive directions, float32 noise is neither kept nor fitted."""
    w, x = normal(11, 40, 60), massive(12, 10, 60, 100.0)
    c = gram(x.float())
    factors = eigen(w, 20, input_gram=c, dtype=torch.bfloat16)
    exact = eigen(w, 20, input_gram=gram(x), dtype=F64)
    assert factors.data_rank == exact.data_rank == 10
    assert factors.u.double().norm(dim=0).max() < 1.1
    assert lost_energy(w, factors) == pytest.approx(lost_energy(w, exact), rel=0.02)


@pytest.mark.parametrize("strength", [1.0, 100.0, 1000.0])
def test_precision_rule(strength: float) -> None:
    """Float32 products summed in float64 stay near the optimum beside massive directions."""
    w, x = normal(13, 48, 64), massive(14, 2048, 64, strength)
    c = gram(x)
    best = lost_energy(w, eigen(w, 16, input_gram=c, dtype=F64), c)
    ours = lost_energy(w, eigen(w, 16, input_gram=gram(x.float()), dtype=F64), c)
    assert ours / best - 1 < {1.0: 1e-9, 100.0: 1e-4, 1000.0: 0.05}[strength]
    assert ours / best - 1 > -1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("seed", [20, 30, 40])
def test_solving_again_beats_rounding(shape: tuple[int, int], strength: float, seed: int) -> None:
    """In bfloat16, a u that is refitted to the rounded v is never worse than a rounded u."""
    w, x = normal(seed, *shape), massive(seed + 1, 400, shape[1], strength)
    solved = eigen(w, 6, input_gram=gram(x), dtype=torch.bfloat16)
    rounded = eigen(w, 6, output_gram=gram(x @ w.T), dtype=torch.bfloat16)
    assert torch.equal(solved.v, rounded.v)
    best = float(rounded.spectrum[6:].sum() / rounded.spectrum.sum())
    excess, plain = (lost_energy(w, item, gram(x)) - best for item in (solved, rounded))
    assert excess >= 0
    assert excess < 0.96 * plain
    if strength == 100.0:
        assert plain > 0.005 * best


@given(seed=st.integers(0, 999), count=st.integers(1, 40))
@settings(max_examples=30)
def test_refit_never_hurts(seed: int, count: int) -> None:
    """From any start and with any number of tokens, refitting never increases the squared error."""
    y, z, u0 = normal(seed, count, 9), normal(seed + 1, count, 6), normal(seed + 2, 9, 6)
    u = refit(cross(y, z), gram(z), u0)
    assert (y - z @ u.T).norm() <= (y - z @ u0.T).norm() * (1 + 1e-12)
    if count >= 12:
        best = torch.linalg.lstsq(z, y).solution.T
        torch.testing.assert_close(u, best, rtol=0, atol=1e-5)


def test_refit_keeps_unseen_directions() -> None:
    """Hidden directions orthogonal to the data are mapped as by u0."""
    y, u0 = normal(1, 30, 9), normal(2, 9, 6)
    basis = torch.linalg.qr(normal(3, 6, 6)).Q
    z = normal(4, 30, 2) @ basis[:, :2].T
    u = refit(cross(y, z), gram(z), u0)
    torch.testing.assert_close(u @ basis[:, 2:], u0 @ basis[:, 2:], rtol=0, atol=1e-10)
    assert (u @ basis[:, :2] - u0 @ basis[:, :2]).norm() > 1
    nothing = torch.zeros(6, 6, dtype=F64)
    assert torch.equal(refit(torch.zeros(9, 6, dtype=F64), nothing, u0), u0)


def test_second_pass_equals_known_gram() -> None:
    """Output Gram, then `refit` in a second pass: the same error as with the input Gram."""
    w, x = normal(50, 12, 20), massive(51, 400, 20, 100.0)
    first = eigen(w, 6, output_gram=gram(x @ w.T), dtype=torch.bfloat16)
    z = x @ first.v.double().T
    u = refit(cross(x @ w.T, z), gram(z), first.u)
    second = replace(first, u=u.bfloat16())
    direct = eigen(w, 6, input_gram=gram(x), dtype=torch.bfloat16)
    assert lost_energy(w, second, gram(x)) == pytest.approx(
        lost_energy(w, direct, gram(x)), rel=1e-3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_layers(shape: tuple[int, int]) -> None:
    """A rank-deficient W is reproduced; a zero W or a zero Gram matrix gives finite factors."""
    m, n = shape
    thin = normal(60, m, 2) @ normal(61, 2, n)
    torch.testing.assert_close(product(eigen(thin, 5, dtype=F64)), thin, rtol=0, atol=1e-9)
    nothing = torch.zeros(m, n, dtype=F64)
    factors = eigen(nothing, 5, dtype=F64)
    assert product(factors).abs().max() == 0
    assert (factors.kept_share, factors.data_rank, lost_energy(nothing, factors)) == (1.0, 0, 0.0)
    w = normal(62, m, n)
    blind = eigen(w, 5, input_gram=torch.zeros(n, n, dtype=F64), dtype=F64)
    torch.testing.assert_close(product(blind), product(eigen(w, 5, dtype=F64)), rtol=0, atol=1e-8)


def test_bad_input_is_refused() -> None:
    """The errors name wrong ranks, wrong shapes, two Grams and numbers that are not finite."""
    w, c = normal(70, 4, 6), torch.eye(6, dtype=F64)
    with pytest.raises(ValueError, match="rank 5"):
        eigen(w, 5, dtype=F64)
    with pytest.raises(ValueError, match="not both"):
        eigen(w, 2, input_gram=c, output_gram=c[:4, :4], dtype=F64)
    with pytest.raises(ValueError, match="output_gram must be 4 x 4"):
        eigen(w, 2, output_gram=c, dtype=F64)
    with pytest.raises(ValueError, match="input_gram holds values that are not finite"):
        eigen(w, 2, input_gram=c / 0, dtype=F64)
    with pytest.raises(ValueError, match="not finite"):
        whiten(w, 2, c * torch.nan, dtype=F64)
    with pytest.raises(ValueError, match="positive trace"):
        whiten(w, 2, c * 0, dtype=F64)
    with pytest.raises(ValueError, match="got"):
        refit(w, c, w.T)
