"""Factors that keep what the loss depends on."""

import torch

from emloc.calibration.moments import Statistics
from emloc.emulators.svd.factors import factorize
from emloc.tensors.linalg.factorize import eigen
from emloc.tensors.linalg.sensitivity import DAMPING, output_root


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_root_is_that_of_the_gradients_gram():
    rows = random(50, 6) * torch.tensor([1e-7, 1, 3, 0, 2, 5], dtype=torch.float64)
    gram = rows.T @ rows
    gram = gram / gram.diagonal().mean() + DAMPING * torch.eye(6, dtype=torch.float64)
    root = output_root(rows * 1e-5)
    torch.testing.assert_close(root.T @ root, gram)
    torch.testing.assert_close(root, root.triu())
    assert output_root(torch.zeros(4, 6)) is None


def weighted_error(weight, factors, root, inputs) -> float:
    error = root @ (weight - factors.u.double() @ factors.v.double())
    return float((error @ inputs.T @ inputs * error).sum())


def fit(weight, inputs, gradients, rank, *, inputs_only):
    statistics = Statistics()
    statistics.add({"layer": inputs}, {"layer": weight}, inputs_only)
    layers = factorize({"layer": weight}, {"layer": rank}, statistics, "eigen", gradients=gradients)
    return layers["layer"].factors


def test_no_factors_of_this_rank_lose_less_of_what_the_loss_depends_on():
    """The optimum of the problem: the truncated SVD of the weight between both roots."""
    weight, inputs, rows = random(10, 14), random(60, 14, seed=1), random(40, 10, seed=2)
    rows = rows * torch.logspace(-2, 1, 10, dtype=torch.float64)
    root = output_root(rows)
    right = torch.linalg.cholesky(inputs.T @ inputs)
    sigma = torch.linalg.svdvals(root @ weight @ right)
    least = float(sigma[3:].square().sum())
    factors = fit(weight, inputs, {"layer": rows}, 3, inputs_only=True)
    found = weighted_error(weight, factors, root, inputs)
    assert abs(found - least) < 1e-9 * least
    plain = eigen(weight, 3, input_gram=inputs.T @ inputs, dtype=torch.float64)
    assert weighted_error(weight, plain, root, inputs) > 1.05 * least


def test_an_output_gram_gives_the_same_directions():
    """The pass behind it fits u to the tokens, so that v alone has to agree."""
    weight, inputs, rows = random(6, 14), random(60, 14, seed=1), random(40, 6, seed=2)
    of_inputs = fit(weight, inputs, {"layer": rows}, 2, inputs_only=True)
    of_outputs = fit(weight, inputs, {"layer": rows}, 2, inputs_only=False)
    for one, other in ((of_inputs.v, of_outputs.v), (of_inputs.u.T, of_outputs.u.T)):
        stacked = torch.linalg.svdvals(torch.cat([one, other]))
        assert float(stacked[2] / stacked[0]) < 1e-6


def test_layers_without_gradients_keep_their_factors():
    weight, inputs = random(6, 8), random(30, 8, seed=1)
    plain = fit(weight, inputs, {}, 2, inputs_only=True)
    silent = fit(weight, inputs, {"layer": torch.zeros(5, 6)}, 2, inputs_only=True)
    torch.testing.assert_close(plain.u @ plain.v, silent.u @ silent.v, rtol=0, atol=0)
