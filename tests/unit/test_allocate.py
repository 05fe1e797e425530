"""Ranks for all layers under one budget: the spent budget, the kept energy, and optimality."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.tensors.linalg.allocate import MIN_GAIN, greedy, spectrum
from emloc.tensors.linalg.factorize import eigen, rank_of

F64 = torch.float64


@st.composite
def problems(draw):
    """Draw spectra, shapes, uniform ranks and a multiple."""
    multiple = draw(st.sampled_from([1, 2, 3]))
    ratio = draw(st.floats(0.3, 0.95))
    seed = draw(st.integers(0, 2**31))
    spectra, shapes, uniform = {}, {}, {}
    generator = torch.Generator().manual_seed(seed)
    for index in range(draw(st.integers(1, 5))):
        m, n = (draw(st.integers(14, 40)) for _ in range(2))
        decay = draw(st.sampled_from([0.0, 0.5, 2.0, 6.0]))
        values = torch.rand(min(m, n), generator=generator, dtype=F64)
        values *= torch.arange(1, min(m, n) + 1, dtype=F64) ** -decay
        values *= draw(st.sampled_from([1e-6, 1.0, 1e6]))
        if draw(st.booleans()):
            # All values are zero if the slice starts at the first.
            values[draw(st.integers(0, min(m, n) - 1)) :] = 0
        name = f"layer.{index}"
        spectra[name], shapes[name] = values.sort(descending=True).values, (m, n)
        uniform[name] = rank_of(ratio, m, n, multiple) if ratio * m * n >= multiple * (m + n) else 0
    return spectra, shapes, {k: max(v, multiple) for k, v in uniform.items()}, multiple


def spent(ranks, shapes) -> int:
    return sum(rank * sum(shapes[layer]) for layer, rank in ranks.items())


def lost(ranks, spectra) -> float:
    """Return the sum of relative tail energies."""
    return sum(
        float(spectra[layer][rank:].sum() / total)
        for layer, rank in ranks.items()
        if (total := spectra[layer].sum()) > 0
    )


def cap(shape: tuple[int, int], multiple: int) -> int:
    m, n = shape
    return m * n // (m + n) // multiple * multiple


@given(problems())
@settings(max_examples=150)
def test_the_budget_is_spent_and_never_exceeded(problem):
    spectra, shapes, uniform, multiple = problem
    ranks = greedy(spectra, shapes, uniform, multiple)
    assert list(ranks) == list(uniform)
    for layer, rank in ranks.items():
        assert multiple <= rank <= cap(shapes[layer], multiple)
        assert rank % multiple == 0
    unspent = spent(uniform, shapes) - spent(ranks, shapes)
    assert unspent >= 0
    for layer, rank in ranks.items():
        assert rank == cap(shapes[layer], multiple) or multiple * sum(shapes[layer]) > unspent


@given(problems())
@settings(max_examples=150)
def test_greedy_ranks_lose_no_more_energy_than_uniform_ranks(problem):
    spectra, shapes, uniform, multiple = problem
    ranks = greedy(spectra, shapes, uniform, multiple)
    assert lost(ranks, spectra) <= lost(uniform, spectra) + 1e-9


@given(problems())
@settings(max_examples=150)
def test_moving_one_chunk_of_rank_never_keeps_more_energy(problem):
    spectra, shapes, uniform, multiple = problem
    ranks = greedy(spectra, shapes, uniform, multiple)
    before, budget = lost(ranks, spectra), spent(uniform, shapes)
    for giving, getting in itertools.permutations(ranks, 2):
        other = ranks | {giving: ranks[giving] - multiple, getting: ranks[getting] + multiple}
        allowed = other[giving] >= multiple and other[getting] <= cap(shapes[getting], multiple)
        if allowed and spent(other, shapes) <= budget:
            assert lost(other, spectra) >= before - 2 * MIN_GAIN


def test_greedy_ranks_are_optimal_if_layers_cost_the_same():
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys("abc", (12, 12))
    spectra = {
        name: torch.rand(12, generator=generator, dtype=F64).pow(power).sort(descending=True).values
        for name, power in (("a", 1), ("b", 4), ("c", 12))
    }
    uniform = dict.fromkeys("abc", 3)
    ranks = greedy(spectra, shapes, uniform, 1)
    every = itertools.product(range(1, 7), repeat=3)
    least = min(lost(dict(zip("abc", one, strict=True)), spectra) for one in every if sum(one) <= 9)
    assert lost(ranks, spectra) == pytest.approx(least, abs=1e-12)
    assert len(set(ranks.values())) > 1


def test_a_layer_with_one_direction_passes_its_rank_to_the_other_layer():
    one, flat = torch.zeros(20, dtype=F64), torch.ones(20, dtype=F64)
    one[0] = 100
    shapes = {"one": (20, 20), "flat": (20, 20)}
    ranks = greedy({"one": one, "flat": flat}, shapes, {"one": 4, "flat": 4}, 1)
    assert ranks == {"one": 1, "flat": 7}
    # Rank that the other layer cannot use stays.
    ranks = greedy({"one": one, "flat": flat}, shapes, {"one": 8, "flat": 8}, 1)
    assert ranks == {"one": 6, "flat": 10}


def test_ranks_do_not_depend_on_the_scale_of_a_layer():
    falling = torch.arange(20, 0, -1, dtype=F64)
    shapes = {"weak": (20, 20), "strong": (20, 20)}
    spectra = {"weak": falling, "strong": 2**30 * falling}
    assert greedy(spectra, shapes, {"weak": 5, "strong": 5}, 1) == {"weak": 5, "strong": 5}


def test_a_layer_that_costs_half_as_much_is_preferred():
    shapes = {"thin": (20, 20), "wide": (20, 60)}
    spectra = dict.fromkeys(shapes, torch.ones(20, dtype=F64))
    ranks = greedy(spectra, shapes, {"thin": 4, "wide": 4}, 1)
    assert ranks == {"thin": 10, "wide": 1}


@pytest.mark.parametrize("rank", [0, 3, 12])
def test_an_invalid_uniform_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"one: rank {rank} .* multiple of 2, .*\(20 x 20\)"):
        greedy({"one": torch.ones(20, dtype=F64)}, {"one": (20, 20)}, {"one": rank}, 2)


# The spectrum it chooses by ----------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("kind", ["input_gram", "output_gram", None])
def test_the_spectrum_gives_the_loss_of_the_best_factors(m, n, kind):
    generator = torch.Generator().manual_seed(m)
    weight = torch.randn(m, n, generator=generator, dtype=F64)
    x = torch.randn(50, n, generator=generator, dtype=F64) * torch.arange(1, n + 1) ** -0.7
    given_grams: dict[str, Tensor] = {}
    if kind == "input_gram":
        given_grams = {kind: x.T @ x}
    elif kind == "output_gram":
        given_grams = {kind: weight @ x.T @ x @ weight.T}
    energies = spectrum(weight, **given_grams)
    unspent = weight if kind is None else weight @ x.T
    torch.testing.assert_close(energies, torch.linalg.svdvals(unspent).square()[:12])
    exact = eigen(weight, 3, **given_grams, dtype=F64)
    torch.testing.assert_close(energies, exact.spectrum)
    assert exact.kept_share == pytest.approx(float(energies[:3].sum() / energies.sum()), abs=1e-12)


def test_energies_are_not_negative_with_few_tokens():
    x = torch.randn(5, 30, dtype=F64)
    energies = spectrum(torch.randn(20, 30, dtype=F64), input_gram=x.T @ x)
    assert float(energies.min()) >= 0
    assert float(energies[5:].sum()) < 1e-10 * float(energies.sum())
