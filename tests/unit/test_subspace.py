"""The subspace iteration: nearly as good as the exact solver, which it falls back to."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.tensors.linalg import subspace as module
from emloc.tensors.linalg.factorize import Factors, eigen, lost_energy, refit
from emloc.tensors.linalg.gram import cross, gram
from emloc.tensors.linalg.subspace import MAX_STEPS, subspace

F64 = torch.float64
P = 512  # the smallest size for which the iteration is used
INDEX = torch.arange(1, P + 1, dtype=F64)
MASSIVE = INDEX**-0.5
MASSIVE[:4] *= 1000.0
# Spectra of the output energy. The plateau covers all tested ranks, so that any subspace of it is
# optimal.
SPECTRA = {
    "flat": torch.ones(P, dtype=F64),
    "i^-0.25": INDEX**-0.25,
    "i^-0.5": INDEX**-0.5,
    "i^-1": INDEX**-1,
    "i^-2": INDEX**-2,
    "step": torch.where(INDEX <= 60, 1.0, 0.5).double(),
    "plateau": torch.where(INDEX <= 20, 5.0, 1.0).double(),
    "strong above flat": torch.where(INDEX <= 24, 100.0, 1.0).double() * INDEX**-0.1,
    "four directions": MASSIVE,
    "massive": torch.cat([torch.full((4,), 1e6, dtype=F64), INDEX[:-4] ** -0.5]),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterate for all ranks for which a GPU does."""
    monkeypatch.setattr(module, "SIZE_PER_COLUMN", module.SIZE_PER_COLUMN_ON_GPU)


def normal(seed: int, *shape: int) -> Tensor:
    """Return float64 Gaussian numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotation(seed: int, size: int) -> Tensor:
    """Return a random orthogonal matrix."""
    q: Tensor = torch.linalg.qr(normal(seed, size, size)).Q
    return q


def spread(spectrum: Tensor, seed: int) -> Tensor:
    """Return a Gram matrix with this spectrum in rotated directions."""
    turn = rotation(seed, spectrum.numel())
    total = turn * spectrum @ turn.T
    return (total + total.T) / 2


def excess(weight: Tensor, factors: Factors, best: Factors, c: Tensor | None) -> float:
    """Return the excess of the lost energy over the optimum, relative to the optimum."""
    return lost_energy(weight, factors, c) / lost_energy(weight, best, c) - 1


@pytest.mark.parametrize("rank", [5, 60, 200])
@pytest.mark.parametrize("name", SPECTRA)
def test_loses_hardly_more_than_the_optimum(name: str, rank: int) -> None:
    """Relative error within 0.1 % of the optimum; at least the reported energy `kept` is kept."""
    w, c = rotation(1, P), spread(SPECTRA[name], 2)
    fast = subspace(w, rank, input_gram=c, dtype=F64)
    assert (fast.solver, fast.data_rank) == ("subspace", rank)
    assert (fast.u.shape, fast.v.shape) == ((P, rank), (rank, P))
    assert 0 < fast.steps <= MAX_STEPS
    best = eigen(w, rank, input_gram=c, dtype=F64)
    assert best.solver == "eigen"
    assert -1e-9 < excess(w, fast, best, c) < 0.001
    # Refitting u is another half step, so that slightly more is kept than the subspace captured.
    lost = lost_energy(w, fast, c)
    assert -1e-12 < 1 - lost - fast.kept_share < 0.001 * lost
    assert fast.spectrum.shape == (rank,)
    assert (fast.spectrum.diff() <= 0).all()
    assert float(fast.spectrum.sum()) == pytest.approx(fast.kept_share * float(best.spectrum.sum()))
    # No sum of captured energies can exceed that of the leading directions.
    ahead = best.spectrum[:rank].cumsum(0) - fast.spectrum.cumsum(0)
    assert float(ahead.min()) > -1e-9 * float(best.spectrum.sum())
    off = (fast.spectrum / best.spectrum[:rank]).log().abs()
    assert float(off.mean()) < 0.05
    assert float(off.max()) < 0.35


@pytest.mark.parametrize("shape", [(P, P), (P, 800), (800, P)])
@pytest.mark.parametrize("kind", ["none", "channels", "rotated"])
def test_gaussian_weights(shape: tuple[int, int], kind: str) -> None:
    """Wide, square and tall weights, without data or beside massive channels or directions."""
    m, n = shape
    w, c = normal(3, m, n), None
    if kind != "none":
        x = normal(4, 1500, n)
        x[:, :4] *= 1000.0
        c = gram(x if kind == "channels" else x @ rotation(5, n))
    fast = subspace(w, 50, input_gram=c, dtype=F64)
    assert fast.solver == "subspace"
    assert -1e-9 < excess(w, fast, eigen(w, 50, input_gram=c, dtype=F64), c) < 0.002


@given(seed=st.integers(0, 999), power=st.floats(0, 2.5), rank=st.integers(1, 220))
@settings(max_examples=12)
def test_any_power_law(seed: int, power: float, rank: int) -> None:
    """The lost energy is within 0.2 % of the optimum for any decay, rank and directions.

    With an almost flat spectrum the iteration may use all its steps; `eigen` then takes over.
    """
    spectrum = INDEX**-power
    w = rotation(seed, P)
    c = spread(spectrum, seed + 1)
    fast = subspace(w, rank, input_gram=c, dtype=F64)
    tail = float(spectrum[rank:].sum() / spectrum.sum())
    assert fast.solver == "subspace" or fast.steps == MAX_STEPS
    assert -1e-9 < (1 - fast.kept_share) / tail - 1 < 0.002


def test_output_gram_is_enough() -> None:
    """Outputs of a wide layer alone give the same quality; a tall layer falls back to `eigen`."""
    w, c = normal(6, P, 640), spread(torch.arange(1, 641, dtype=F64) ** -0.5, 7)
    outputs = w @ c @ w.T
    fast = subspace(w, 50, output_gram=outputs, dtype=F64)
    original = outputs.clone()
    assert fast.solver == "subspace"
    assert torch.equal(outputs, original)
    assert -1e-9 < excess(w, fast, eigen(w, 50, output_gram=outputs, dtype=F64), c) < 0.002
    tall = subspace(w.T.contiguous(), 50, output_gram=w.T @ w, dtype=F64)
    assert (tall.solver, tall.steps) == ("eigen", 0)


def test_solving_again_in_bfloat16() -> None:
    """u is refitted to the rounded v as by the exact solver, in one pass or two."""
    w, x = normal(8, P, P), normal(9, 1200, P) * INDEX**-0.5
    c = gram(x)
    fast, best = (one(w, 60, input_gram=c, dtype=torch.bfloat16) for one in (subspace, eigen))
    assert fast.u.dtype == fast.v.dtype == torch.bfloat16
    assert abs(excess(w, fast, best, c)) < 0.002
    first = subspace(w, 60, output_gram=w @ c @ w.T, dtype=torch.bfloat16)
    z = x @ first.v.double().T
    u = refit(cross(x @ w.T, z), gram(z), first.u)
    assert abs(excess(w, replace(first, u=u.bfloat16()), best, c)) < 0.002


@pytest.mark.parametrize("shape", [(P, 600), (600, P)])
@pytest.mark.parametrize("count", [30, 62])
def test_fewer_tokens_than_columns_are_left_to_the_exact_solver(
    shape: tuple[int, int], count: int
) -> None:
    """The factors equal those of the exact solver, and the result names this solver."""
    w, x = normal(10, *shape), normal(11, count, shape[1])
    fast, best = (one(w, 60, input_gram=gram(x), dtype=F64) for one in (subspace, eigen))
    assert (fast.solver, fast.data_rank) == ("eigen", min(count, 60))
    assert torch.equal(fast.u, best.u)
    assert torch.equal(fast.v, best.v)


def test_float32_noise_is_not_data() -> None:
    """Float32 noise makes a Gram matrix of few tokens look like full rank, but is not fitted."""
    x = normal(12, 40, P)
    x[:, :4] *= 100.0
    c = gram((x @ rotation(13, P)).float())
    w = normal(14, P, P)
    fast, best = (one(w, 60, input_gram=c, dtype=F64) for one in (subspace, eigen))
    assert best.data_rank == 40
    assert (fast.solver, fast.data_rank) == ("eigen", 40)


def test_weights_of_low_rank() -> None:
    """A W of low rank, a zero W and a zero Gram matrix."""
    thin = normal(15, 600, 20) @ normal(16, 20, P)
    for w in (thin, thin.T.contiguous()):
        fast = subspace(w, 40, dtype=F64)
        assert (fast.solver, fast.data_rank) == ("eigen", 20)
        assert lost_energy(w, fast) < 1e-20
    nothing = torch.zeros(P, P, dtype=F64)
    fast = subspace(nothing, 40, dtype=F64)
    assert (fast.solver, fast.kept_share, fast.data_rank) == ("eigen", 1.0, 0)
    assert not fast.u.isnan().any()
    blind = subspace(normal(17, P, P), 40, input_gram=nothing, dtype=F64)
    assert (blind.solver, blind.data_rank) == ("eigen", 0)


@pytest.mark.parametrize(
    ("least", "solver"), [(1e-3, "subspace"), (1e-5, "eigen"), (1e-9, "eigen")]
)
def test_tall_weight_too_skew_to_be_squared(least: float, solver: str) -> None:
    """Data lies in weak directions of W that W^T W loses: the exact solver takes over."""
    scale = torch.linspace(0, 1, P, dtype=F64).mul(torch.tensor(least).log()).exp()
    turn = rotation(19, P)
    w = rotation(18, 600)[:, :P] * scale @ turn
    c = turn.T * (INDEX.flip(0) ** -0.5 / scale**2) @ turn
    fast, best = (one(w, 60, input_gram=c, dtype=F64) for one in (subspace, eigen))
    assert fast.solver == solver
    assert -1e-9 < excess(w, fast, best, c) < 0.002


def test_slow_convergence_is_left_to_the_exact_solver() -> None:
    """With a gap of 2 % at the rank each step still gains, so that the last step is not trusted."""
    w = rotation(21, P)
    c = spread(torch.where(INDEX <= 100, 1.0, 0.98).double(), 22)
    fast = subspace(w, 100, input_gram=c, dtype=F64)
    assert (fast.solver, fast.steps) == ("eigen", MAX_STEPS)
    assert fast.spectrum.shape == (P,)


@pytest.mark.parametrize(("size", "rank"), [(P - 1, 50), (P, 256), (P, P)])
def test_small_layers_and_high_ranks_are_decomposed_at_once(size: int, rank: int) -> None:
    """The exact solver is used without any step if an iteration could not be faster."""
    fast = subspace(normal(23, size, size), rank, dtype=F64)
    assert (fast.solver, fast.steps, fast.data_rank) == ("eigen", 0, rank)


def test_same_bits_every_time() -> None:
    """The result neither depends on the global random generator nor changes its state."""
    w, c = normal(24, P, P), spread(INDEX**-0.5, 25)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(subspace(w, 40, input_gram=c, dtype=F64))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0].u, results[1].u)
    assert torch.equal(results[0].v, results[1].v)


def test_scale_does_not_matter() -> None:
    """Weights and Gram matrices of any magnitude converge alike."""
    w, c = normal(26, P, P), spread(INDEX**-0.5, 27)
    plain = subspace(w, 40, input_gram=c, dtype=F64)
    for size in (1e-30, 1e30):
        other = subspace(w, 40, input_gram=c * size, dtype=F64)
        assert other.steps == plain.steps
        assert other.kept_share == pytest.approx(plain.kept_share, rel=1e-9)


def test_bad_input_is_refused() -> None:
    """The checks of `eigen` run before any work."""
    w, c = normal(28, P, 600), torch.eye(600, dtype=F64)
    with pytest.raises(ValueError, match="rank 513"):
        subspace(w, P + 1, dtype=F64)
    with pytest.raises(ValueError, match="not both"):
        subspace(w, 2, input_gram=c, output_gram=c[:P, :P], dtype=F64)
    with pytest.raises(ValueError, match="input_gram holds values that are not finite"):
        subspace(w, 2, input_gram=c / 0, dtype=F64)
    with pytest.raises(ValueError, match="weight holds values that are not finite"):
        subspace(w * torch.nan, 2, dtype=F64)


def test_a_cpu_iterates_for_low_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At higher ranks an eigendecomposition is faster on a CPU."""
    monkeypatch.undo()
    w = normal(23, P, P)
    assert subspace(w, 60, dtype=F64).solver == "subspace"
    assert subspace(w, 80, dtype=F64).solver == "eigen"
