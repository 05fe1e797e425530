"""Rounding with error feedback, and the formats of two and three bits that use it."""

import pytest
import torch
from packed import INT2, INT3
from torch import Tensor

from emloc.emulators.svd.factors import rotated
from emloc.precision.error_feedback import DAMPING, inverse_root, round_rows
from emloc.precision.uniform import GROUP, Uniform
from emloc.tensors.linalg.factorize import eigen

FORMATS = pytest.mark.parametrize("precision", [INT2, INT3], ids=["int2", "int3"])


def correlated(count: int, width: int) -> Tensor:
    """Rows (count, width) with a few strong common directions, as hidden states have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator)
    mixing *= torch.logspace(0, -2, width)[:, None]
    return torch.randn(count, width, generator=generator) @ mixing


def gram(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def rounded(matrix: Tensor, gram: Tensor) -> Tensor:
    """The matrix rounded to whole numbers from -100 to 100 with error feedback along its rows."""
    ones = torch.ones_like(matrix)
    return round_rows(matrix, gram, ones, 100 * ones, 200).float() - 100


# The rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 64, 200])
def test_the_inverse_root_is_upper_triangular_and_inverts_the_damped_gram(width):
    total = gram(correlated(300, width))
    root = inverse_root(total).double()
    assert torch.equal(root, root.triu())
    damped = total / total.diagonal().mean() + DAMPING * torch.eye(width)
    torch.testing.assert_close(root.T @ root @ damped, torch.eye(width).double(), atol=1e-3, rtol=0)


def test_a_gram_of_one_direction_and_one_of_zeros_are_factored():
    direction = torch.ones(1, 500) * 1000
    assert inverse_root(gram(direction)).isfinite().all()
    assert inverse_root(torch.zeros(3, 3)).isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        inverse_root(torch.full((2, 2), float("nan")))


def test_the_feedback_is_the_best_change_of_the_rows_that_are_not_rounded_yet():
    """Against a least-squares solve for the rows that are left, after each rounding."""
    total = gram(correlated(50, 5))
    damped = total + DAMPING * total.diagonal().mean() * torch.eye(5)
    matrix = 3 * normal(5, 3)
    current, order = matrix.double(), total.diagonal().argsort(descending=True).tolist()
    for place, index in enumerate(order):
        error = current[index] - current[index].round()
        current[index] = current[index].round()
        rest = order[place + 1 :]
        if rest:
            whole = damped[rest][:, rest]
            current[rest] += torch.linalg.solve(whole, damped[rest, index][:, None] * error)
    assert torch.equal(rounded(matrix, total), current.float())
    assert not torch.equal(current.float(), matrix.round())


@pytest.mark.parametrize("width", [3, 64, 65, 150])
def test_every_row_is_rounded_once_and_the_product_is_closer(width):
    rows, matrix = correlated(400, width), 2 * normal(width, 9)
    result = rounded(matrix, gram(rows))
    assert torch.equal(result, result.round())
    apart = (rows @ (result - matrix)).square().sum()
    assert apart < 0.7 * (rows @ (matrix.round() - matrix)).square().sum()


def test_without_correlation_each_number_is_rounded_to_the_nearest():
    matrix = normal(70, 5)
    assert torch.equal(rounded(matrix, torch.eye(70)), matrix.round())


def test_a_gram_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"need a Gram \(4, 4\), got \(3, 3\)"):
        rounded(normal(4, 2), torch.eye(3))


# The formats -------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (13, 37), (64, 64), (70, 130)], ids=str)
def test_codes_are_packed_tightly_and_survive(shape, precision):
    packed = precision.quantize(normal(*shape))
    groups = shape[0] * -(-shape[1] // GROUP)
    assert packed.nbytes == groups * (GROUP * precision.bits // 8 + 2) + 4
    matrix = packed.dequantize()
    assert matrix.shape == shape
    assert len(matrix[0, :GROUP].unique()) <= 2**precision.bits
    # Its own values are on a grid, so quantising them again changes little.
    again = precision.quantize(matrix).dequantize()
    assert (again - matrix).norm() <= 0.15 * matrix.norm()


@FORMATS
def test_nearest_codes_are_at_most_half_a_step_away_inside_the_range(precision):
    matrix = torch.rand(20, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    apart = (precision.quantize(matrix).dequantize() - matrix).abs()
    assert apart.max() <= 1 / (2**precision.bits - 1)
    assert apart.mean() <= 0.3 / (2**precision.bits - 1)


@FORMATS
@pytest.mark.parametrize("shape", [(9, 40), (30, 64), (24, 200)], ids=str)
def test_feedback_along_columns_and_rows_lowers_the_error_of_the_product(shape, precision):
    matrix = normal(*shape)
    rows, columns = correlated(500, shape[0]), correlated(500, shape[1])
    nearest = precision.quantize(matrix).dequantize()
    for_inputs = precision.quantize(matrix, columns=gram(columns)).dequantize()
    for_outputs = precision.quantize(matrix, rows=gram(rows)).dequantize()
    before = (columns @ (nearest - matrix).T).square().sum()
    assert (columns @ (for_inputs - matrix).T).square().sum() < 0.6 * before
    before = (rows @ (nearest - matrix)).square().sum()
    assert (rows @ (for_outputs - matrix)).square().sum() < 0.7 * before


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_extreme_numbers_stay_finite(precision, dtype):
    for matrix in (torch.zeros(3, 70), torch.full((3, 70), 3e4), normal(3, 70) * 1e-6):
        packed = precision.quantize(matrix.to(dtype), columns=torch.eye(70))
        assert packed.dequantize().dtype == dtype
        assert packed.dequantize().isfinite().all()
    assert (precision.quantize(torch.zeros(3, 70)).dequantize() == 0).all()


@FORMATS
def test_rotated_factors_have_the_same_product_and_lose_less(precision):
    inputs, weight = correlated(600, 60), normal(80, 60)
    total = gram(inputs)

    def error(factors, v):
        through = v.dequantize().double() @ total @ v.dequantize().double().T
        ut = precision.quantize(factors.u.T.contiguous().float(), rows=through)
        product = ut.dequantize().T @ v.dequantize()
        return (inputs @ (product - weight).T).square().sum()

    plain = eigen(weight, 30, input_gram=total, dtype=torch.float64)
    turned = rotated(plain)
    torch.testing.assert_close(turned.u @ turned.v, plain.u @ plain.v)
    quantized = [precision.quantize(one.v.float(), columns=total) for one in (plain, turned)]
    assert error(turned, quantized[1]) < 0.75 * error(plain, quantized[0])


def test_bits_beyond_the_format_are_refused():
    with pytest.raises(Exception, match="bits must be in"):
        Uniform(name="int9", bits=9)
