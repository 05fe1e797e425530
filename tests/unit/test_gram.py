"""Sums over tokens do not depend on chunks, dtype and global precision switches."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.tensors.linalg.gram import cross, exact_float32, gram, has_data, product


def tokens(seed: int, count: int, features: int) -> Tensor:
    """Return float64 Gaussian activations (count, features)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


@pytest.fixture
def medium() -> Iterator[None]:
    """Set the least exact float32 products of torch for one test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@given(
    seed=st.integers(0, 999),
    count=st.integers(0, 40),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    chunk=st.integers(1, 50),
)
@settings(max_examples=60)
def test_chunks_add_up(seed: int, count: int, n: int, m: int, chunk: int) -> None:
    """Any chunk size gives X^T Y and X^T X, also for no tokens."""
    x, y = tokens(seed, count, n), tokens(seed + 1000, count, m)
    torch.testing.assert_close(cross(x, y, chunk), x.T @ y, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram(x, chunk), x.T @ x, rtol=0, atol=1e-12)


def test_sums_are_float64() -> None:
    """The sum 2^26 + 2, which float32 cannot represent, is exact."""
    x = torch.ones(3, 1)
    x[0] = 2.0**13
    assert gram(x, chunk=1).item() == 2.0**26 + 2
    assert (x.T @ x).item() != 2.0**26 + 2


def test_long_sums_keep_digits() -> None:
    """Chunked products are several times more exact than one float32 product over all tokens."""
    x = (tokens(0, 20_000, 24) + 3).float()
    exact = x.double().T @ x.double()
    error = ((gram(x) - exact) / exact).abs()
    naive = (((x.T @ x).double() - exact) / exact).abs()
    assert error.max() < 1e-7
    assert error.mean() < naive.mean() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_widened(dtype: torch.dtype) -> None:
    """16-bit activations are exact numbers; only the float32 rounding of the products is added."""
    x, y = tokens(1, 300, 5).to(dtype), tokens(2, 300, 3).to(dtype)
    result = cross(x, y)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, x.double().T @ y.double(), rtol=0, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    """Results under bfloat16 autocast are bitwise equal; plain products would change."""
    x = tokens(3, 256, 64).float()
    expected, plain = gram(x), x.T @ x
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram(x), expected)
        assert not torch.equal((x.T @ x).float(), plain)


@pytest.mark.usefixtures("medium")
def test_precision_switches_change_nothing_and_stay() -> None:
    """Results under "medium" are bitwise equal, and the switch is restored, also after an error."""

    def switches() -> list[str]:
        # By name, since the type stubs lack those of oneDNN.
        backends = (torch.backends.cuda, torch.backends.mkldnn)
        return [str(getattr(backend, "matmul").fp32_precision) for backend in backends]  # noqa: B009

    x, before = tokens(4, 256, 512).float(), switches()
    loose = gram(x)
    assert switches() == before == ["tf32", "bf16"]
    with exact_float32(x.device):
        assert switches() == ["ieee", "ieee"]
    with pytest.raises(KeyError), exact_float32(x.device):
        raise KeyError
    assert switches() == before
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(loose, gram(x))


def test_no_graph() -> None:
    """Statistics have no gradient graph."""
    assert not gram(tokens(5, 4, 3).requires_grad_()).requires_grad


def test_bad_input_is_refused() -> None:
    """The errors name the wrong shape or chunk."""
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        gram(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(4, 3\)"):
        cross(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="got 0"):
        gram(torch.zeros(2, 3), chunk=0)


def test_supported_reads_noise_from_negative_values() -> None:
    """Values below 1e-10 of the largest or twice the most negative value count as noise."""
    values = torch.tensor([1.0, 1e-6, 1e-9, 1e-12], dtype=torch.float64)
    assert has_data(values).tolist() == [True, True, True, False]
    noisy = torch.cat([values, values.new_tensor([-1e-8])])
    assert has_data(noisy).tolist() == [True, True, False, False, False]
    assert not has_data(torch.zeros(3)).any()
    assert has_data(torch.zeros(0)).shape == (0,)


def test_a_total_is_added_to_in_place() -> None:
    """Adding batch by batch to one matrix equals the sum over all tokens."""
    x, y = tokens(6, 700, 5), tokens(7, 700, 3)
    total, mixed = gram(x[:300]), cross(x[:300], y[:300])
    assert gram(x[300:], total=total) is total
    assert cross(x[300:], y[300:], total=mixed) is mixed
    torch.testing.assert_close(total, x.T @ x, rtol=0, atol=1e-11)
    torch.testing.assert_close(mixed, x.T @ y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("total", [torch.zeros(3, 2).double(), torch.zeros(3, 3)])
def test_a_total_that_cannot_hold_the_sum_is_refused(total: Tensor) -> None:
    """A total of a wrong shape or precision is refused."""
    with pytest.raises(ValueError, match=r"total must be \(3, 3\) in float64"):
        gram(torch.zeros(2, 3), total=total)


@pytest.mark.usefixtures("medium")
def test_a_product_is_float32_whatever_goes_in() -> None:
    """16-bit inputs give a float32 product; float64 inputs stay float64."""
    x, w = tokens(8, 64, 512), tokens(9, 512, 32)
    exact = x.bfloat16().double() @ w.bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        actual = product(x.bfloat16(), w.bfloat16())
    assert actual.dtype == torch.float32
    assert float((actual - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(product(x, w), x @ w)
    assert product(x.float(), w.bfloat16()).dtype == torch.float32
    assert not product(x.requires_grad_(), w).requires_grad
